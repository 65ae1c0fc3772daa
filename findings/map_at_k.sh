#!/usr/bin/env bash
# torchmetrics 1.9.0 (with torch 2.14.1): two surprises in retrieval_average_precision and RetrievalMAP.
#
#  - A match whose score is not above zero counts as no match: with negated distances mAP is 0 for the best of
#    rankings, and of cosines the matches below zero are left out. Nothing is said. The same rankings with all scores
#    shifted above zero get other numbers.
#  - top_k divides by the matches among the first k, trec_eval's AP@k (here ir-measures 0.4.3 with
#    pytrec-eval-terrier 0.5.11) by all: one match at place 1 and none after it is perfect, and a further match at place
#    5 lowers the number.
# And a query without any match counts as zero (empty_target_action="neg"), where this field leaves it out.
# A cure: scores above zero (2 - distance for cosines), k = the size of the gallery, empty_target_action="skip".
#
# Seen (4 matches among 10 gallery images; torchmetrics, then trec_eval, at 5 and at 10):
#   matches at places (1, 8, 9, 10): at 5 1.0000 0.2500, at 10 0.4958 0.4958
#   matches at places (1, 5, 9, 10): at 5 0.7000 0.3500, at 10 0.5333 0.5333
#   matches at places (1, 4, 5, 10): at 5 0.7000 0.5250, at 10 0.6250 0.6250
#   the last ranking with scores 10 to 1: 0.6250, 4 to -5: 0.7500, -1 to -10: 0.0000
#   with a query without a match: RetrievalMAP 0.3125, with empty_target_action="skip" 0.6250
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    torch==2.14.1 numpy==2.4.6 torchmetrics==1.9.0 ir-measures==0.4.3 pytrec-eval-terrier==0.5.11
cd "$work"
venv/bin/python - <<'PY'
import torch
from ir_measures import AP, Qrel, ScoredDoc, calc_aggregate
from torchmetrics.functional.retrieval import retrieval_average_precision
from torchmetrics.retrieval import RetrievalMAP

EXPECTED = {  # places of the matches: torchmetrics and trec_eval at 5, both at 10
    (1, 8, 9, 10): (1.0, 0.25, 0.49583333),
    (1, 5, 9, 10): (0.7, 0.35, 0.53333333),
    (1, 4, 5, 10): (0.7, 0.525, 0.625),
}
similarities = torch.arange(10, 0, -1.0)  # the gallery image at place 1 comes first
for places, (found, every, whole) in EXPECTED.items():
    right = torch.tensor([place in places for place in range(1, 11)])
    qrels = [Qrel("query", str(k), int(right[k])) for k in range(10)]
    run = [ScoredDoc("query", str(k), float(similarities[k])) for k in range(10)]
    ours = [float(retrieval_average_precision(similarities, right, top_k=k)) for k in (5, 10)]
    trec = calc_aggregate([AP @ 5, AP @ 10], qrels, run)
    seen = ours[0], trec[AP @ 5], ours[1], trec[AP @ 10]
    print("matches at places {}: at 5 {:.4f} {:.4f}, at 10 {:.4f} {:.4f}".format(places, *seen))
    for value, expected in zip(seen, (found, every, whole, whole)):
        assert abs(value - expected) < 1e-6, "the behaviour has changed"

shifted = [float(retrieval_average_precision(similarities - shift, right)) for shift in (0, 6, 11)]
print("the last ranking with scores 10 to 1: {:.4f}, 4 to -5: {:.4f}, -1 to -10: {:.4f}".format(*shifted))
assert shifted[0] == 0.625 and shifted[1] == 0.75 and shifted[2] == 0, "the behaviour has changed"

values = []
for action in ("neg", "skip"):
    metric = RetrievalMAP(empty_target_action=action)
    metric.update(similarities.repeat(2), torch.cat([right, right & False]), torch.arange(2).repeat_interleave(10))
    values.append(float(metric.compute()))
print('with a query without a match: RetrievalMAP {:.4f}, with empty_target_action="skip" {:.4f}'.format(*values))
assert RetrievalMAP().empty_target_action == "neg"
assert values[0] == values[1] / 2
PY
