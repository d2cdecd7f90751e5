// fastpo._host: the integer work on trees and packs, on numpy arrays. fastpo/host_python.py has the same functions.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "packing.h"
#include "tree.h"
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

py::array_t<int64_t> insert_all(fastpo::Trie& trie, const Ids& tokens, const Ids& cu_seqlens) {
  const auto ids = view(tokens, "tokens");
  const auto cu = view(cu_seqlens, "cu_seqlens");
  bool rising = !cu.empty() && cu.front() == 0 && cu.back() == static_cast<int64_t>(ids.size());
  for (size_t s = 0; s + 1 < cu.size(); ++s) rising &= cu[s] <= cu[s + 1];
  if (!rising) throw py::value_error("cu_seqlens should rise from 0 to the number of tokens, " + std::to_string(ids.size()));
  return array_of(trie.insert_all(ids, cu));
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

fastpo::Shape shape(const Ids& parent, const Ids& depth, const Ids& subtree_end) {
  const fastpo::Shape tree{view(parent, "parent"), view(depth, "depth"), view(subtree_end, "subtree_end")};
  const size_t n = tree.parent.size();
  if (tree.depth.size() != n || tree.subtree_end.size() != n) {
    throw py::value_error("parent, depth and subtree_end should be of one length");
  }
  for (size_t i = 0; i < n; ++i) {
    const int64_t p = tree.parent[i];
    if (p < -1 || p >= static_cast<int64_t>(i) || tree.depth[i] != (p < 0 ? 0 : tree.depth[p] + 1)) {
      throw py::value_error("node " + std::to_string(i) + " and its parent " + std::to_string(p) + " are of no tree in preorder");
    }
  }
  return tree;
}

// leaves and starts of the sequences of a tree with n nodes
std::pair<std::span<const int64_t>, std::span<const int64_t>> sequences(const Ids& leaves, const Ids& starts, size_t n) {
  const auto at = view(leaves, "leaves"), from = view(starts, "starts");
  bool inside = at.size() == from.size();
  for (const int64_t leaf : at) inside &= leaf >= 0 && leaf < static_cast<int64_t>(n);
  for (const int64_t start : from) inside &= start >= 0;
  if (!inside) throw py::value_error("leaves should be nodes below " + std::to_string(n) + ", with as many starts, not below 0");
  return {at, from};
}

std::tuple<py::array_t<int64_t>, py::array_t<int64_t>> sequence_nodes(
    const Ids& parent, const Ids& depth, const Ids& subtree_end, const Ids& leaves, const Ids& starts) {
  const auto tree = shape(parent, depth, subtree_end);
  const auto [at, from] = sequences(leaves, starts, tree.parent.size());
  fastpo::SequenceNodes out = fastpo::sequence_nodes(tree, at, from);
  return {array_of(std::move(out.nodes)), array_of(std::move(out.cu_seqlens))};
}

py::array_t<int64_t> trained_nodes(
    const Ids& parent, const Ids& depth, const Ids& subtree_end, const Ids& leaves, const Ids& starts) {
  const auto tree = shape(parent, depth, subtree_end);
  const auto [at, from] = sequences(leaves, starts, tree.parent.size());
  return array_of(fastpo::trained_nodes(tree, at, from));
}

py::array_t<int64_t> cut(const Ids& parent, const Ids& depth, const Ids& subtree_end, int64_t budget) {
  const auto tree = shape(parent, depth, subtree_end);
  for (const int64_t d : tree.depth) {
    if (d >= budget) {
      throw py::value_error("budget is " + std::to_string(budget) + "; it should be at least " + std::to_string(d + 1) +
                            ", the length of a path");
    }
  }
  std::vector<int64_t> bounds = fastpo::cut(tree, budget);
  const auto pieces = static_cast<py::ssize_t>(bounds.size() / 2);
  return array_of(std::move(bounds)).reshape({pieces, py::ssize_t{2}});
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Tries, packing and cutting, in C++.";
  py::class_<fastpo::Trie>(m, "Trie", "A trie over token ids that grows by appending.")
      .def(py::init<>())
      .def("insert", &insert, py::arg("tokens"), py::arg("from_node") = -1,
           "insert(tokens [n] int64, from_node=-1) -> id of the node of the last token (from_node if n is 0)")
      .def("insert_all", &insert_all, py::arg("tokens"), py::arg("cu_seqlens"),
           "insert_all(tokens [T] int64, cu_seqlens [S+1] int64) -> id of the node of each sequence's last token [S]")
      .def("__len__", &fastpo::Trie::size)
      .def("preorder", &preorder,
           "dict of int64 arrays [nodes] in preorder: tokens, parent (-1: root), depth, subtree_end; and position: node "
           "id -> preorder index");
  m.def("first_fit_decreasing", &first_fit_decreasing, py::arg("lengths"), py::arg("budget"),
        "first_fit_decreasing(lengths [n] int64, budget) -> bin of each item [n] int64");
  m.def("sequence_nodes", &sequence_nodes, py::arg("parent"), py::arg("depth"), py::arg("subtree_end"),
        py::arg("leaves"), py::arg("starts"),
        "sequence_nodes(parent, depth, subtree_end [N], leaves, starts [S]) -> (nodes [T], cu_seqlens [S+1]): the nodes "
        "of each sequence from depth start on");
  m.def("trained_nodes", &trained_nodes, py::arg("parent"), py::arg("depth"), py::arg("subtree_end"),
        py::arg("leaves"), py::arg("starts"),
        "trained_nodes(parent, depth, subtree_end [N], leaves, starts [S]) -> [M]: the nodes in sequence_nodes, once each, "
        "ascending");
  m.def("cut", &cut, py::arg("parent"), py::arg("depth"), py::arg("subtree_end"), py::arg("budget"),
        "cut(parent, depth, subtree_end [N], budget) -> [pieces, 2] (first, end): the path to first and the nodes "
        "first:end, at most budget nodes; the fewest possible nodes in more than one piece");
}
