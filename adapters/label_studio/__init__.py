"""A backend for Label Studio: pre-annotates tasks and answers to rectangles that a person draws.

`python -m adapters.label_studio` starts it; docs/adapters/label-studio.md says how to connect it.
"""
