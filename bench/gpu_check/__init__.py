"""Everything a GPU has to say about the kernels, in one command and under ten minutes.

    python -m bench.gpu_check

Needs torch, triton, numpy and nvcc, and no network. It builds in place, tries every kernel in a process of its
own (one that hangs or leaves its memory is lost, the rest goes on), checks them against the float64 oracle, runs
compute-sanitizer over a small set, measures the ceilings, and on Hopper the rates that decide about wgmma
(probes.cu), times every kernel beside cuDNN in CUDA graphs, layers and whole networks, writes
bench/records/<device>-<date>.json with the hash of the kernels' sources, and prints its table last. Stages have
deadlines: what did not fit is listed in the record, never dropped in silence.

`--dry-run` goes through the same code on the CPU with tiny layers: it tests this program and says nothing
about speed.
"""
