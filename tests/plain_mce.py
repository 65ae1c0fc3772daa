"""docs/method.md once more, plainly: float64, loops, no speed, and not a line shared with the product.

The network is the ResNet-18 variant. Its weights and running statistics are one dict of tensors under
torchvision's names: `visible.conv1.weight` and `infrared.bn1.bias` in the two stems (`shared.` for the
one stem), `layer1.0.conv1.weight` … in the trunk, `layer2.0.nonlocal.{g,theta,phi,out,norm}`, `gem.p`,
`neck`. Autograd gives the gradients; everything else is written out.
"""

import torch
import torch.nn.functional as F

MODALITIES = ("visible", "infrared", "aux")
WEIGHTS = {"shared": 1.0, "visible": 1.0, "infrared": 1.0, "aux": 0.4, "align": 1.2, "center": 1.0}
TEMPERATURE = 0.05
MOMENTUM = {"shared": 0.1, "visible": 0.25, "infrared": 0.25, "aux": 0.25}
MARGIN = 0.3


# the network (section 4)


def batch_norm(state, name, x, training):
    over = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    if training:
        mean = x.mean(over)
        var = ((x - mean.reshape(shape)) ** 2).mean(over)
        count = x.numel() // x.shape[1]
        for key, seen in (("running_mean", mean), ("running_var", var * count / (count - 1))):
            state[f"{name}.{key}"] = 0.9 * state[f"{name}.{key}"] + 0.1 * seen.detach()
    else:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    unit = (x - mean.reshape(shape)) / (var.reshape(shape) + 1e-5).sqrt()
    return unit * state[f"{name}.weight"].reshape(shape) + state[f"{name}.bias"].reshape(shape)


def stem(state, name, images, training):
    x = F.conv2d(images, state[f"{name}.conv1.weight"], stride=2, padding=3)
    return F.max_pool2d(batch_norm(state, f"{name}.bn1", x, training).relu(), 3, stride=2, padding=1)


def block(state, name, x, stride, training):
    y = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
    y = batch_norm(state, f"{name}.bn1", y, training).relu()
    y = F.conv2d(y, state[f"{name}.conv2.weight"], padding=1)
    y = batch_norm(state, f"{name}.bn2", y, training)
    if f"{name}.downsample.0.weight" in state:
        x = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
        x = batch_norm(state, f"{name}.downsample.1", x, training)
    return (y + x).relu()


def non_local(state, name, x, training):
    """All pairs of positions: f (N, HW, HW) is written out, quadratic in the positions."""
    number, _, height, width = x.shape

    def conv(part, x):
        return F.conv2d(x, state[f"{name}.{part}.weight"], state[f"{name}.{part}.bias"])

    g, theta, phi = (conv(part, x).flatten(2) for part in ("g", "theta", "phi"))  # (N, 1, HW) each
    f = theta.transpose(1, 2) @ phi / (height * width)
    y = (f @ g.transpose(1, 2)).transpose(1, 2).reshape(number, 1, height, width)
    return batch_norm(state, f"{name}.norm", conv("out", y), training) + x


def network(state, images, training):
    """BNNeck outputs (N, D) of a dict stem -> images (N, 3, H, W), in the dict's order."""
    x = torch.cat([stem(state, name, those, training) for name, those in images.items()])
    for layer, stride in ((1, 1), (2, 2), (3, 2), (4, 1)):  # last stride 1
        for k in range(2):
            x = block(state, f"layer{layer}.{k}", x, stride if k == 0 else 1, training)
            if layer in (2, 3):  # a layer of ResNet-18 has two blocks: its last two, its last three
                x = non_local(state, f"layer{layer}.{k}.nonlocal", x, training)
    p = state["gem.p"]
    pooled = x.clamp(min=1e-6).pow(p).flatten(2).mean(2).pow(1 / p)
    return batch_norm(state, "neck", pooled, training)


def unit(x):
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def by_stem(images, stem):
    """The network's input for images of the three modalities, and the modalities' order in its output."""
    if stem == "shared":
        return {"shared": torch.cat([images[m] for m in MODALITIES])}, MODALITIES
    visible = torch.cat([images["visible"], images["aux"]])
    return {"visible": visible, "infrared": images["infrared"]}, ("visible", "aux", "infrared")


def features(state, images, stem, training):
    inputs, order = by_stem(images, stem)
    rows = unit(network(state, inputs, training)).split([len(images[m]) for m in order])
    return dict(zip(order, rows, strict=True))


# the memory bank (section 5)


def reset(features, labels, num_classes):
    """The four tables (C, D) from the training set's features and labels of each modality."""
    tables = {}
    for m in MODALITIES:
        means = [features[m][labels[m] == c].mean(0) for c in range(num_classes)]
        tables[m] = torch.stack([unit(mean) for mean in means])
    tables["shared"] = (tables["visible"] + tables["infrared"] + tables["aux"]) / 3
    return tables


def update(tables, features, labels):
    new = {name: table.clone() for name, table in tables.items()}
    for y in set(labels.tolist()):
        rows = [k for k in range(len(labels)) if labels[k] == y]
        picks = {m: sum(features[m][k] for k in rows) / len(rows) for m in MODALITIES}
        every = [features[m][k] for m in MODALITIES for k in rows]
        picks["shared"] = min(every, key=lambda f: float(f @ tables["shared"][y]))
        for name, q in picks.items():
            new[name][y] = unit(MOMENTUM[name] * tables[name][y] + (1 - MOMENTUM[name]) * q)
    return new


# the loss (section 6)


def cross_entropy(rows, table, labels):
    losses = []
    for f, y in zip(rows, labels, strict=True):
        logits = table @ f / TEMPERATURE
        losses.append(logits.logsumexp(0) - logits[y])
    return sum(losses) / len(losses)


def divergence(teacher, student):
    """KL(softmax(teacher) ‖ softmax(student)) of two vectors of logits."""
    log_t, log_s = teacher - teacher.logsumexp(0), student - student.logsumexp(0)
    return sum(log_t[c].exp() * (log_t[c] - log_s[c]) for c in range(len(teacher)))


def align(features, centers):
    others = {"visible": "infrared", "infrared": "visible", "aux": "aux"}
    asked = {"visible": "visible", "infrared": "infrared", "aux": "infrared"}
    losses = []
    for m in MODALITIES:
        for k, f in enumerate(features[m]):
            student = centers[m] @ f / TEMPERATURE
            teacher = centers[asked[m]] @ features[others[m]][k] / TEMPERATURE
            losses.append(divergence(teacher.detach(), student))
    return sum(losses) / len(losses)


def center_triplet(features, labels, centers):
    losses = []
    for m in MODALITIES:
        for f, y in zip(features[m], labels.tolist(), strict=True):
            distance = {j: ((f - centers[j]) ** 2).sum().clamp(min=1e-12).sqrt() for j in labels.tolist()}
            nearest = min(d for j, d in distance.items() if j != y)
            losses.append((distance[y] - nearest + MARGIN).clamp(min=0))
    return sum(losses) / len(losses)


def loss(features, labels, historical, current, proxies="historical"):
    """(total, terms): terms unweighted."""
    align_on = {"historical": [historical], "updated": [current], "both": [historical, current]}[proxies]
    every = torch.cat([features[m] for m in MODALITIES])
    terms = {"shared": cross_entropy(every, current["shared"], labels.repeat(3))}
    terms |= {m: cross_entropy(features[m], current[m], labels) for m in MODALITIES}
    terms["align"] = sum(align(features, tables) for tables in align_on) / len(align_on)
    terms["center"] = center_triplet(features, labels, historical["shared"])
    return sum(WEIGHTS[name] * term for name, term in terms.items()), terms


# the optimisation (section 7)


def learning_rate(epoch, base=3.5e-4, decay=(20, 40)):
    if epoch < 10:
        return base * (epoch + 1) / 10
    if epoch >= decay[1]:
        return base * 0.01
    return base * 0.1 if epoch > decay[0] else base


def adam(state, gradients, moments, step, rate, weight_decay=5e-4):
    """One step of Adam (Kingma and Ba, 2015), weight decay as an L2 term of the gradient; in place."""
    for name, gradient in gradients.items():
        gradient = gradient + weight_decay * state[name]
        if name not in moments:
            moments[name] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        first, second = moments[name]
        first += 0.1 * (gradient - first)
        second += 0.001 * (gradient**2 - second)
        unbiased_first, unbiased_second = first / (1 - 0.9**step), second / (1 - 0.999**step)
        state[name] = state[name] - rate * unbiased_first / (unbiased_second.sqrt() + 1e-8)


def train(state, epochs, stem, num_classes, proxies="historical"):
    """Train in place and return each step's (total, terms) as floats.

    Args:
        state: the initial weights and running statistics.
        epochs: for each, (its number, the memory's images and labels per modality, its batches of images
            per modality and labels).
        stem: two-stream or shared.
        num_classes: C.
        proxies: the proxies that `align` asks for.
    """
    frozen = {"neck.bias"}
    trained = [name for name in state if "running" not in name and name not in frozen]
    moments, history, step = {}, [], 0
    for epoch, (memory_images, memory_labels), batches in epochs:
        with torch.no_grad():
            historical = reset(features(state, memory_images, stem, False), memory_labels, num_classes)
        current = historical
        for images, labels in batches:
            step += 1
            for name in trained:
                state[name] = state[name].detach().requires_grad_()
            rows = features(state, images, stem, True)
            total, terms = loss(rows, labels, historical, current, proxies)
            gradients = torch.autograd.grad(total, [state[name] for name in trained])
            with torch.no_grad():
                current = update(current, {m: f.detach() for m, f in rows.items()}, labels)
                adam(state, dict(zip(trained, gradients, strict=True)), moments, step, learning_rate(epoch))
            history.append((total.item(), {name: term.item() for name, term in terms.items()}))
    return history
