// tree_search on the CPU: implements fastpo_c::tree_select, tree_backup and tree_process_values, whose arguments
// kernels/tree_search/reference.py describes. A task is a tree; only the nodes along its paths and their siblings are read.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "parallel.h"

namespace fastpo {
namespace {

using torch::stable::Tensor;

constexpr int64_t kNone = -1;  // UNVISITED and NO_PARENT
constexpr double kMuzeroBase = 19652, kMcNestEpsilon = 1e-10;
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kTreeWork = 1024;  // what a tree costs, in elements of parallel.h

enum class Form : int64_t { none, puct, ucb1, uct, muzero, mc_nest };
enum class Unvisited : int64_t { formula, bonus, first };
enum class Kind : int64_t { mean, children, max_mix };

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

struct NotATree {};

void check_node(bool fine) {
  if (!fine) throw NotATree();
}

// f(b) for every tree; what a thread throws is said once all of them are done.
template <class F>
void for_each_tree(int64_t batch, int64_t work, const F& f) {
  std::atomic<bool> fine{true};
  for_each_task(batch, batch * work, [&](int64_t b) {
    try {
      f(b);
    } catch (const NotATree&) {
      fine = false;
    }
  });
  STD_TORCH_CHECK(fine, "tree_search: the arrays hold no tree (ids should grow from parents to children)");
}

// What one tree's links are; children of a node by `for (c = first_child; c != kNone; c = sibling(c))`.
struct Links {
  const int64_t *parent, *first_child, *next_sibling;
  int64_t nodes;

  int64_t child(int64_t node) const {
    const int64_t c = first_child[node];
    check_node(c == kNone || (c > node && c < nodes));
    return c;
  }
  int64_t sibling(int64_t node) const {
    const int64_t s = next_sibling[node];
    check_node(s == kNone || (s > node && s < nodes));
    return s;
  }
  int64_t up(int64_t node) const {
    const int64_t p = parent[node];
    check_node(p == kNone || (p >= 0 && p < node));
    return p;
  }
};

struct SelectSettings {
  Form form;
  double c;
  Unvisited unvisited;
  double bonus;
  bool prior;
  double virtual_loss;
};

// What the siblings of a node share of its score.
struct Explore {
  const SelectSettings& rule;
  double factor;

  Explore(const SelectSettings& settings, double parent_visits) : rule(settings), factor(0) {
    const double log = std::log(std::max(parent_visits, 1.0));
    switch (rule.form) {
      case Form::none: break;
      case Form::puct: factor = rule.c * std::sqrt(parent_visits); break;
      case Form::ucb1: factor = 2 * log; break;
      case Form::uct: factor = log; break;
      case Form::muzero:
        factor = (rule.c + std::log((parent_visits + kMuzeroBase + 1) / kMuzeroBase)) * std::sqrt(parent_visits);
        break;
      case Form::mc_nest: factor = log + 1; break;
    }
  }
  double operator()(double visits, double prior) const {
    if (visits == 0 && rule.unvisited == Unvisited::bonus) return rule.bonus;
    if (visits == 0 && rule.unvisited == Unvisited::first) return kInfinity;
    switch (rule.form) {
      case Form::none: return 0;
      case Form::puct:
      case Form::muzero: return prior * (factor / (1 + visits));
      case Form::ucb1:
      case Form::uct: return prior * (rule.c * std::sqrt(factor / visits));
      case Form::mc_nest: return prior * (rule.c * std::sqrt(factor / (visits + kMcNestEpsilon)));
    }
    return 0;
  }
};

struct Selection {
  Links links;
  SelectSettings rule;
  const int64_t* visits;
  int64_t* pending;
  const float *q, *prior;
  const bool *expandable, *closed;

  double total(int64_t node) const { return static_cast<double>(visits[node] + pending[node]); }

  double score(int64_t node, const Explore& explore) const {
    const double waiting = static_cast<double>(pending[node]), done = static_cast<double>(visits[node]);
    const double u = explore(done + waiting, rule.prior ? prior[node] : 1);
    return q[node] - rule.virtual_loss * waiting / (std::max(done, 1.0) + waiting) + u;
  }

  int64_t descend(int64_t node) const {
    check_node(node >= 0 && node < links.nodes);
    if (closed[node]) return kNone;
    while (!expandable[node]) {
      const int64_t first = links.child(node);
      if (first == kNone) break;
      const Explore explore(rule, total(node));
      int64_t best = kNone;
      double best_score = -kInfinity;
      for (int64_t child = first; child != kNone; child = links.sibling(child)) {
        __builtin_prefetch(links.first_child + child);  // of the one that is taken; its siblings stand on the same lines
        __builtin_prefetch(expandable + child);
        if (closed[child]) continue;
        const double found = score(child, explore);
        if (found > best_score) best = child, best_score = found;
      }
      if (best == kNone) return kNone;
      node = best;
    }
    return node;
  }

  int64_t best_open(int64_t size, const int64_t* taken, int64_t num_taken) const {
    int64_t best = kNone;
    double best_score = -kInfinity;
    for (int64_t node = 0; node < size; ++node) {
      if (!expandable[node] || closed[node] || std::find(taken, taken + num_taken, node) != taken + num_taken) continue;
      const int64_t above = links.up(node);
      const double found = score(node, Explore(rule, total(above == kNone ? node : above)));
      if (found > best_score) best = node, best_score = found;
    }
    return best;
  }
};

void select_op(const Tensor parent, const Tensor first_child, const Tensor next_sibling, const Tensor visits,
               const Tensor pending, const Tensor q, const Tensor prior, const Tensor expandable, const Tensor closed,
               const Tensor size, const std::optional<Tensor> start, int64_t form, double c, int64_t unvisited,
               double bonus, bool use_prior, bool frontier, double virtual_loss, const Tensor leaves) {
  const int64_t batch = parent.size(0), nodes = parent.size(1), count = leaves.size(1);
  const SelectSettings rule{static_cast<Form>(form), c, static_cast<Unvisited>(unvisited), bonus, use_prior, virtual_loss};
  const int64_t* starts = start ? input<int64_t>(*start) : nullptr;
  const int64_t* sizes = input<int64_t>(size);
  int64_t *const all_pending = output<int64_t>(pending), *const out = output<int64_t>(leaves);
  for_each_tree(batch, kTreeWork, [&](int64_t b) {
    const int64_t at = b * nodes;
    const Links links{input<int64_t>(parent) + at, input<int64_t>(first_child) + at, input<int64_t>(next_sibling) + at,
                      nodes};
    const Selection tree{links, rule, input<int64_t>(visits) + at, all_pending + at, input<float>(q) + at,
                         input<float>(prior) + at, input<bool>(expandable) + at, input<bool>(closed) + at};
    int64_t* own = out + b * count;
    for (int64_t w = 0; w < count; ++w) {
      int64_t leaf = frontier ? tree.best_open(sizes[b], own, w) : tree.descend(starts == nullptr ? 0 : starts[b]);
      if (std::find(own, own + w, leaf) != own + w) leaf = kNone;
      own[w] = leaf;
      for (int64_t node = leaf; node != kNone; node = links.up(node)) ++tree.pending[node];
    }
  });
}

struct BackupSettings {
  Kind kind;
  double gamma, min_visits;
  bool rewards;
  double mix;
  bool close;
};

struct Backup {
  Links links;
  BackupSettings rule;
  int64_t *visits, *pending;
  float* q;
  const float* reward;
  const bool* expandable;
  bool* closed;

  double mean(int64_t node, double x) const {
    return visits[node] == 1 ? x : q[node] + (x - q[node]) / static_cast<double>(visits[node]);
  }

  double children(int64_t node, double x, bool is_leaf) const {
    double total = 0, weighted = 0;
    for (int64_t child = links.child(node); child != kNone; child = links.sibling(child)) {
      const double weight = std::max(static_cast<double>(visits[child]), rule.min_visits);
      total += weight;
      weighted += weight * q[child];
    }
    if (total <= 0 && !is_leaf) return q[node];
    return (rule.rewards ? reward[node] : 0) + rule.gamma * (total > 0 ? weighted / total : x);
  }

  double max_mix(int64_t node, double x, bool is_leaf) const {
    const int64_t first = links.child(node);
    if (first == kNone) return is_leaf ? x : q[node];
    double best = q[first];
    for (int64_t child = first; child != kNone; child = links.sibling(child)) best = std::max<double>(best, q[child]);
    return (1 - rule.mix) * q[node] + rule.mix * best;
  }

  void up(int64_t leaf, double x) const {
    for (int64_t node = leaf; node != kNone; node = links.up(node)) {
      ++visits[node];
      pending[node] = std::max<int64_t>(0, pending[node] - 1);
      switch (rule.kind) {
        case Kind::mean: q[node] = static_cast<float>(mean(node, x)); break;
        case Kind::children: q[node] = static_cast<float>(children(node, x, node == leaf)); break;
        case Kind::max_mix: q[node] = static_cast<float>(max_mix(node, x, node == leaf)); break;
      }
    }
  }

  bool finished(int64_t node) const {
    int64_t child = links.child(node);
    if (expandable[node] || child == kNone) return false;
    while (child != kNone && closed[child]) child = links.sibling(child);
    return child == kNone;
  }

  // A node above one that stays open stays open too.
  void close_up(int64_t node) const {
    for (; node != kNone && (closed[node] || finished(node)); node = links.up(node)) closed[node] = true;
  }
};

void backup_op(const Tensor parent, const Tensor first_child, const Tensor next_sibling, const Tensor visits,
               const Tensor pending, const Tensor q, const Tensor reward, const Tensor expandable, const Tensor closed,
               const Tensor leaves, const Tensor values, int64_t kind, double gamma, double min_visits,
               bool use_rewards, double mix, bool close) {
  const int64_t batch = parent.size(0), nodes = parent.size(1), count = leaves.size(1);
  const BackupSettings rule{static_cast<Kind>(kind), gamma, min_visits, use_rewards, mix, close};
  const int64_t* all_leaves = input<int64_t>(leaves);
  const float* all_values = input<float>(values);
  int64_t *const all_visits = output<int64_t>(visits), *const all_pending = output<int64_t>(pending);
  float* const all_q = output<float>(q);
  bool* const all_closed = output<bool>(closed);
  for_each_tree(batch, kTreeWork, [&](int64_t b) {
    const int64_t at = b * nodes;
    const Links links{input<int64_t>(parent) + at, input<int64_t>(first_child) + at, input<int64_t>(next_sibling) + at,
                      nodes};
    const Backup tree{links,      rule,
                      all_visits + at, all_pending + at,
                      all_q + at, input<float>(reward) + at,
                      input<bool>(expandable) + at, all_closed + at};
    for (int64_t i = b * count; i < (b + 1) * count; ++i) {
      if (all_leaves[i] == kNone) continue;
      check_node(all_leaves[i] >= 0 && all_leaves[i] < nodes);
      tree.up(all_leaves[i], all_values[i]);
      if (rule.close) tree.close_up(all_leaves[i]);
    }
  });
}

void process_values_op(const Tensor parent, const Tensor size, const Tensor signs, const Tensor distances,
                       const Tensor values) {
  const int64_t batch = parent.size(0), nodes = parent.size(1);
  const int64_t *parents = input<int64_t>(parent), *sizes = input<int64_t>(size);
  const float *sign = input<float>(signs), *distance = input<float>(distances);
  float* out = output<float>(values);
  for_each_tree(batch, nodes, [&](int64_t b) {
    const int64_t at = b * nodes;
    std::memset(out + at, 0, nodes * sizeof(float));
    check_node(sizes[b] <= nodes);
    for (int64_t i = 1; i < sizes[b]; ++i) {
      check_node(parents[at + i] >= 0 && parents[at + i] < i);
      const double above = out[at + parents[at + i]];
      out[at + i] = static_cast<float>(std::max(0.0, above + sign[at + i] * (1 - above) / distance[at + i]));
    }
  });
}

}  // namespace
}  // namespace fastpo

STABLE_TORCH_LIBRARY_IMPL(fastpo_c, CPU, m) {
  m.impl("tree_select", TORCH_BOX(&fastpo::select_op));
  m.impl("tree_backup", TORCH_BOX(&fastpo::backup_op));
  m.impl("tree_process_values", TORCH_BOX(&fastpo::process_values_op));
}
