// Errors that a user is meant to read: one line, without the place in this code that STD_TORCH_CHECK puts before it.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastpo {

// std::runtime_error, RuntimeError in Python, of the parts one behind the other.
template <class... Parts>
[[noreturn]] void user_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace fastpo
