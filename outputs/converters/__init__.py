"""Instances in the formats of annotation tools. COCO's own document is `outputs.coco`."""
