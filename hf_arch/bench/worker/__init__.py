"""The process that holds one model under measurement, ours or a peer's.

It runs in the environment of that model, where hf_arch may be impossible to import: this folder is then a package of
its own, `worker`. So its imports are relative, and it needs torch alone; what a subject needs, it imports when built.
"""
