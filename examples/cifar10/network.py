"""The tutorial's network, and its variant in which layers of experts stand before the last linear layer."""
import torch
import torch.nn as nn
import torch.nn.functional as F

FEATURES = 84  # of the last hidden layer, and so of every expert


class Net(nn.Module):
    """[n, 3, 32, 32] to ten scores.

    experts: for each MoE layer its number of experts, none by default; expert_options: what all of these layers get
    beside. After a forward pass `balance_loss` is the sum of their losses of unequal load.
    """

    def __init__(self, experts=(), **expert_options):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, FEATURES)
        if experts:
            from deepspeed_c.moe.layer import MoE

            self.moe_layers = nn.ModuleList([
                MoE(FEATURES, nn.Linear(FEATURES, FEATURES), num_experts=n, **expert_options) for n in experts])
            self.fc4 = nn.Linear(FEATURES, 10)
        else:
            self.moe_layers = ()
            self.fc3 = nn.Linear(FEATURES, 10)
        self.balance_loss = 0.0
        self.counts = [torch.zeros(n, dtype=torch.int64) for n in experts]

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        x = F.relu(self.fc2(x))
        self.balance_loss = 0.0
        for counts, layer in zip(self.counts, self.moe_layers):
            x, loss, chosen = layer(x)
            self.balance_loss = self.balance_loss + loss
            if self.training:
                counts += chosen.to(counts.device)
        return self.fc4(x) if self.moe_layers else self.fc3(x)

    def take_counts(self):
        """How many training images chose each expert since the last call: one tensor, layer after layer."""
        taken = torch.cat(self.counts)
        for counts in self.counts:
            counts.zero_()
        return taken
