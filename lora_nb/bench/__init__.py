"""The benchmark: ours and the reference script on the same work, in processes of their own, parity before speed.

`python -m lora_nb bench` runs it. Nothing is downloaded: base model and pictures are made from a seed. Results are
kept as JSON in the work folder, one file for each part, so that parts can be run one by one.
"""
