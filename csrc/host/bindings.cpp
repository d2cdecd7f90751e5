// fastpo._host: the integer work on trees and packs, on numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "packing.h"
#include "trie.h"

namespace py = pybind11;

namespace {

using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::span<const int64_t> view(const Ids& array, const char* name) {
  if (array.ndim() != 1) {
    throw py::value_error(std::string(name) + " has " + std::to_string(array.ndim()) + " dimensions; it should have 1");
  }
  return {array.data(), static_cast<size_t>(array.size())};
}

py::array_t<int64_t> array_of(std::vector<int64_t>&& values) {
  auto* moved = new std::vector<int64_t>(std::move(values));
  py::capsule owner(moved, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(moved->size()), moved->data(), owner);
}

int64_t insert(fastpo::Trie& trie, const Ids& tokens, int64_t from) {
  if (from < -1 || from >= trie.size()) {
    throw py::value_error("from_node is " + std::to_string(from) + "; it should be -1 or a node below " + std::to_string(trie.size()));
  }
  return trie.insert(view(tokens, "tokens"), from);
}

py::dict preorder(const fastpo::Trie& trie) {
  fastpo::Preorder order = trie.preorder();
  py::dict out;
  out["tokens"] = array_of(std::move(order.tokens));
  out["parent"] = array_of(std::move(order.parent));
  out["depth"] = array_of(std::move(order.depth));
  out["subtree_end"] = array_of(std::move(order.subtree_end));
  out["position"] = array_of(std::move(order.position));
  return out;
}

py::array_t<int64_t> first_fit_decreasing(const Ids& lengths, int64_t budget) {
  const auto items = view(lengths, "lengths");
  for (size_t i = 0; i < items.size(); ++i) {
    if (items[i] < 0 || items[i] > budget) {
      throw py::value_error("lengths[" + std::to_string(i) + "] is " + std::to_string(items[i]) +
                            "; it should be between 0 and the budget, " + std::to_string(budget));
    }
  }
  return array_of(fastpo::first_fit_decreasing(items, budget));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Radix tries and packing, in C++.";
  py::class_<fastpo::Trie>(m, "Trie", "A trie over token ids that grows by appending.")
      .def(py::init<>())
      .def("insert", &insert, py::arg("tokens"), py::arg("from_node") = -1,
           "insert(tokens [n] int64, from_node=-1) -> id of the node of the last token (from_node if n is 0)")
      .def("__len__", &fastpo::Trie::size)
      .def("preorder", &preorder,
           "dict of int64 arrays [nodes] in preorder: tokens, parent (-1: root), depth, subtree_end; and position: node "
           "id -> preorder index");
  m.def("first_fit_decreasing", &first_fit_decreasing, py::arg("lengths"), py::arg("budget"),
        "first_fit_decreasing(lengths [n] int64, budget) -> bin of each item [n] int64");
}
