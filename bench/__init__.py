"""Measurements. Every bench appends JSON lines to `results/` (or $SPECDEC_RESULTS), each with commit and machine.

    specdec bench speed         tokens/s of plain decoding, every drafter and transformers   (systems, intervals)
    python -m bench.readme      the README's table out of the newest of these rows
    python -m bench.serving     servers under load, side by side                             (load, servers)
    python -m bench.soak        ten minutes of mixed load, answers held against offline text
    python -m bench.curves      what buys tau: small training runs
    python -m bench.conformance an exported head in vLLM, counter by counter                 (chain, tiny_pair,
                                                                                             conformance_vllm)
    python -m bench.gpu         all that a GPU must show, in one go: runs and judges the rest (stages, bars, warm)
    python -m bench.abroad      compile here for a GPU elsewhere
    python -m bench.kernels     tree attention                                               (ceilings)
    python -m bench.products    a layer's matrix products
    python -m bench.steps       forwards, drafting and whole rounds                          (whole_round)
    python -m bench.sweep       drafting over plain decoding at every batch                  (replay)

`record` writes rows, `sets` reads the prompts.
"""
