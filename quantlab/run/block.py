"""Applies the edits of one decoder layer in order, while the calibration text passes through it.

    read       the layer is filled with the weights of the source           BlockWeights, EditedLayer
    for each half, attention before mlp:
      for each edit: experts removed, scales folded, linears changed        edits.py
        statistics     of the inputs of the half with its current weights   flow.inputs -> calibration/
        change         tensors and statistics in, tensors out               passes/ -> algorithms/
      advance          the text passes through the edited half              flow.advance

Edits that change the structure of a half come first. Then its linears are changed stage by stage in the order of the
forward pass, each with statistics that reflect the changed stages before it.
"""

from quantlab.plan.model import VariantPlan
from quantlab.run.edits import linear_edits, structure_edits
from quantlab.run.flow import Flow
from quantlab.run.layer import EditedLayer


def edit_layer(variant: VariantPlan, layer: EditedLayer, flow: Flow) -> None:
    """Apply all passes and folds to a layer, and advance the hidden states past it.

    Raises:
        CheckpointError: activations are not finite, or a dtype cannot hold a result.
    """
    for half in range(2):
        for edit in structure_edits(variant, layer, half):
            edit.apply(layer, flow.inputs(half))
        flow.keep_last_inputs(half)
        for edit in linear_edits(layer, half):
            edit.apply(layer, flow.inputs(half))
        flow.advance(half)
    flow.finish_layer()
