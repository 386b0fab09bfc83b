"""HunyuanImage-3.0-Instruct: its network, written from published facts, and the graphs that an edit is made
of.

Nothing is re-exported: the family is `hywu_export.families.hunyuan_image3`.
"""
