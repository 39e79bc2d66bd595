"""The name under which a saved pipeline's index looks for a student's class.

A saved student carries a file of this name, which loads without this package; with it, this is the same class.
"""

from diffusers import ModelMixin as ModelMixin

from asdm.student.unet import AsdmUNet2DConditionModel as AsdmUNet2DConditionModel
