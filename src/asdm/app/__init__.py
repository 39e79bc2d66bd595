"""The page of `asdm app`: the functions behind its tabs, and the tabs (`*_tab.py`), which alone import gradio.

The tabs read widgets, call these functions and show what they return. Models are used by one request at a time.
"""
