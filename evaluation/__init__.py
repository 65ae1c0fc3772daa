"""Features in, numbers out: each file does one thing, and below it are only files that stand above it here.

    half_precision.py  distances and neighbours as the released code's re-ranking has them
    k_reciprocal.py    that re-ranking, of all queries together
    one_at_a_time.py   and of each query with the gallery alone (these three stand below reranking.py)
    counting.py     how many images are nearer than a match, in blocks of distances (below eval_metrics.py)
    intervals.py    mAP and rank-1 without each person: a Jackknife, its 95 % interval, paired differences
    protocols.py    Protocol, and Evaluation: who is searched where in each trial; every image once
    scoring.py      Features, found by path; score(): a Score for each protocol and trial
    embedding.py    TestImages: the images of an evaluation, decoded and embedded once
    rankings.py     which images are ranked first for each query
    similarity.py   how alike images of one person and of two are
    flags.py        the command line that test.py and tools.report share
    models.py       checkpoints: which files, with which settings, on which trials
    files.py        the formats of files of features
    features.py     features of any network as an evaluation uses them: matched, checked, told
    methods.py      Method: checkpoints or features under one name, evaluated in the one loop
    cameras.py      rank-1 and mAP by camera pair
    tables.py       tables, their headings, counts and warnings
    exports.py      JSON, .npz and .mat

What a reader of results needs, and nothing is computed a second time:

    methods = find_methods(get_args_parser, words)      of --resume and --features, in the order typed
    method.evaluate(device)
    scores = method.results[protocol, flip, rerank]     a Scores: .mean, .over_trials, .over_seeds, .jackknife
    one = scores.seeds[0][k]                            a Score: seed 0, k-th trial, numbered one.trial
    one.values.ap, .inp, .first, .counted               (Q,) of each query: AP, INP, first place, if counted
    query, gallery = method.evaluation.samples[protocol, one.trial]      paths, pids, camids in that order
    one.jackknife.persons, .deleted                     (I,), (I, 2): mAP and rank-1 without each person
    difference(row, method, first)                      the paired Jackknife; .interval("mAP") has ± and p
    rank_queries(method.features.trial(query, gallery), protocol.rule, …)     the lists, with distances
"""
