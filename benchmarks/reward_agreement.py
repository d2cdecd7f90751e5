"""How often the ``math`` reward agrees with human labels, and every case where it does not.

    python benchmarks/reward_agreement.py --data model_solutions.jsonl

The data is GSM8K's example_model_solutions.jsonl (github.com/openai/grade-school-math): rows with a question, a ground
truth and four model solutions, each {"is_correct", "solution"}. Exits with 1 below 99% agreement. A row per figure goes
to results/facts.csv.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from facts import record  # noqa: E402

from fastpo.artifacts import read_jsonl  # noqa: E402
from fastpo.rewards import final_answer, math_reward  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threshold", type=float, default=0.99)
    args = parser.parse_args()

    total, disagreements, seconds = 0, [], 0.0
    for number, row in enumerate(read_jsonl(args.data), start=1):
        gold = {"answer": row["ground_truth"]}
        for source, labelled in row.items():
            if not isinstance(labelled, dict):
                continue
            start = time.perf_counter()
            reward = math_reward(row["question"], labelled["solution"], gold)
            seconds += time.perf_counter() - start
            total += 1
            if bool(reward) != labelled["is_correct"]:
                disagreements.append((number, source, reward, labelled, row["ground_truth"]))

    for number, source, reward, labelled, truth in disagreements:
        print(f"line {number}, {source}: reward {reward:.0f}, is_correct {labelled['is_correct']}")
        print(f"  answer {final_answer(labelled['solution'])!r}, truth {final_answer(truth)!r}")
        print(f"  solution ends {labelled['solution'][-80:]!r}")
    share = 1 - len(disagreements) / total
    print(f"{total - len(disagreements)} of {total} agree ({share:.2%}), {seconds / total * 1e6:.1f} us a solution")
    record("reward_agreement.py", {"solutions": (total, ""), "agreement": (round(100 * share, 3), "%")})
    return 0 if share >= args.threshold else 1


if __name__ == "__main__":
    sys.exit(main())
