"""The name under which a saved pipeline's index looks for a student's transformer class.

A saved student carries a file of this name, which loads without this package; with it, this is the same class.
"""

from diffusers import ModelMixin as ModelMixin

from asdm.student.transformer import AsdmPixArtTransformer2DModel as AsdmPixArtTransformer2DModel
