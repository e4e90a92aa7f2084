"""The 4-bit codes of the embedded base are the numbers that its dense weights hold."""

import torch
from safetensors.torch import load_file

from npc_runtime.engine.codes import read_codes


def weights_of(codes):
    """The numbers that codes stand for, `(out_features, in_features)`."""
    if codes.minimum is None:
        return (codes.values.float() * codes.scale[..., None]).flatten(1)
    digits = torch.cat((codes.values & 15, codes.values >> 4), dim=-1).float()
    return (digits * codes.scale[..., None] + codes.minimum[..., None]).flatten(1)


def test_codes_times_scale_are_the_dense_weights(base_folder):
    """Every linear of every layer, q and k with their rows in transformers' order, and the embedding."""
    codes = read_codes(base_folder)
    dense = load_file(base_folder / "model.safetensors")
    assert codes.keys() == {name for name in dense if "_proj." in name or "embed" in name}
    for name, part in codes.items():
        torch.testing.assert_close(weights_of(part), dense[name], atol=1e-7, rtol=1e-6)


def test_a_base_that_was_not_published_in_4_bits_has_no_codes(tmp_path):
    assert read_codes(tmp_path) == {}
