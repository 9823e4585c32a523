"""A model for FiftyOne: `dataset.apply_model(Sam3Model(client, ["car"]), label_field="sam3")`.

`python -m adapters.fiftyone FOLDER --prompts car person` is an example; docs/adapters/fiftyone.md says more.
"""
