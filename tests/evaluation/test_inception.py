import numpy as np
import pytest

from instella_jax.errors import UserError
from instella_jax.evaluation import inception
from tests.needs_torch import needs_torch

pytestmark = pytest.mark.slow


def random_network():
    """The torch network with random weights and statistics that keep its values in range."""
    import torch

    from tests.evaluation.torch_inception import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3().eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name.endswith("conv.weight"):
                torch.nn.init.kaiming_normal_(value)
            elif "bn" in name:
                value.copy_(torch.rand_like(value) * 0.5 + (0.75 if "weight" in name else -0.25))
        for name, value in network.named_buffers():
            if "running" in name:
                value.copy_(torch.rand_like(value) * 0.5 + (0.75 if "var" in name else -0.25))
    return network


@needs_torch
@pytest.mark.parametrize("old", [False, True])
def test_features_are_those_of_torch(tmp_path, old):
    import torch

    network = random_network()
    path = tmp_path / "inception.pth"
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=not old)
    params = inception.load_inception(path)
    images = np.random.default_rng(0).uniform(0, 255, (2, 299, 299, 3)).astype(np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    found = np.asarray(inception.inception_features(params, images))
    assert expected.std() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    inception.save_inception(params, tmp_path / "inception.safetensors")
    again = inception.load_inception(tmp_path / "inception.safetensors")
    np.testing.assert_array_equal(
        again["Mixed_7c"]["branch_pool"]["mean"], params["Mixed_7c"]["branch_pool"]["mean"]
    )


@needs_torch
def test_other_files_are_refused(tmp_path):
    import torch

    state = random_network().state_dict()
    del state["Mixed_6b.branch7x7_2.bn.bias"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match="lack 'Mixed_6b.branch7x7_2.bn.bias'"):
        inception.load_inception(tmp_path / "part.pth")
    torch.save({"x": print}, tmp_path / "code.pth")
    with pytest.raises(UserError, match="was refused"):
        inception.load_inception(tmp_path / "code.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no mapping of tensors"):
        inception.load_inception(tmp_path / "list.pth")
