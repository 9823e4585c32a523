"""A server of the Model Context Protocol: agents find objects in pictures with the tool `segment_image`.

`python -m adapters.mcp --root FOLDER` starts it; docs/adapters/mcp.md says how to connect it.
"""
