"""SAM 3's image model as plain PyTorch modules: tensors in, tensors out. It differentiates.

    vision.py      pixels to image tokens, and to a pyramid of feature maps
    text.py        token ids to text tokens
    geometry.py    boxes and image tokens to the tokens of a prompt
    roi.py         features of boxes
    fusion.py      image tokens and the prompt to fused image tokens
    decoder.py     fused image tokens to queries, boxes, presence and logits
    masks.py       queries to mask logits
    model.py       the whole network, and the order of its steps
    layers.py      what these share
    positions.py   position encodings

Parameters have the names of transformers' `Sam3Model`, except that q, k and v are one product
(sam3_runner/weights/layouts.py translates). The order of the steps is the official model's.
"""
