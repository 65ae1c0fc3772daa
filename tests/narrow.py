"""ResNet-18 with an eighth of the channels, in place of torchvision's from when this is imported.

What the tests train is the code around the network: with 0.2 million weights it is the same code, in a tenth
of the time. Tests of values that belong to a whole network take the fixture whole_resnet18.
"""

import torch
import torchvision

WHOLE = torchvision.models.get_model


class NarrowResNet(torchvision.models.ResNet):
    """torchvision's, with the names of its layers."""

    def __init__(self):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
        self.fc = torch.nn.Linear(512 // 8, 1000)

    def _make_layer(self, block, planes, *args, **settings):
        return super()._make_layer(block, planes // 8, *args, **settings)


def get_model(arch, **settings):
    """torchvision.models.get_model, but for ResNet-18."""
    return NarrowResNet() if arch == "resnet18" else WHOLE(arch, **settings)


torchvision.models.get_model = get_model
