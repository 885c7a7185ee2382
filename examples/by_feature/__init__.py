"""One file for each feature: what a program adds to an ordinary training script is marked `# New`.

python -m examples.by_feature.own_loop        # from the root of the repository; each takes seconds on a CPU
"""
