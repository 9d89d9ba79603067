"""Everything a GPU has to say about the kernels, in one command and under ten minutes.

    python -m bench.gpu_check

Needs torch, triton, numpy and nvcc, and no network. It builds in place while Triton's kernels are compiled on the
other cores, tries every CUDA kernel in a process of its own, checks all kernels against the float64 oracle and the
promises that a GPU alone can break, runs compute-sanitizer over a small set, measures the ceilings, and on Hopper
the rates that decide about wgmma (probes.cu), times every kernel beside cuDNN in CUDA graphs, layers and whole
networks, writes bench/records/<device>-<date>.json with the hash of the kernels' sources, and prints its table last.

Stages have deadlines and are processes: one that hangs is stopped, one that crashes starts again without what it
died of, and the record has what was found until then. What did not fit or was lost is listed, never dropped in
silence, and a record that lacks a stage says so. `--predict` prints what the cost models expect, without a GPU.

`--dry-run` goes through the same code on the CPU with tiny layers: it tests this program and says nothing
about speed.
"""
