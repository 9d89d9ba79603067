"""Everything a GPU has to say about the kernels, in one command and under ten minutes.

    python -m bench.gpu_check

Needs torch, triton, numpy and nvcc, and no network. It builds in place while Triton's kernels are compiled on the
other cores, tries every CUDA kernel in a process of its own, checks the promises that a GPU alone can break and all
kernels against the float64 oracle, times whole networks in CUDA graphs, runs compute-sanitizer over a small set,
measures on Hopper the rates that decide about wgmma (probes.cu), and times every kernel beside cuDNN layer by layer. It
writes bench/records/<device>-<date>.json (-2, -3 where there is one) with the hash of the kernels' sources, and
prints its table last.

Stages have seconds of their own (schedule.py; `--total 480` for eight minutes in all) and are processes: one that hangs
is stopped, one that crashes starts again without what it died of, and the record has what was found until then. What is
short is short for the last rows of layers. What did not fit or was lost is listed, never dropped in silence, and a
record that lacks a stage says so. `--predict` prints what the cost models expect, without a GPU.

`--dry-run` goes through the same code on the CPU with tiny layers: it tests this program and says nothing
about speed.
"""
