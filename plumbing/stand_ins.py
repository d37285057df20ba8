"""What exp_scaling.py has in place of ImageNet, DINOv2 and Inception: made images, a teacher for REPA, and a judge."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from plumbing.data import load_data
from plumbing.images import frechet, gaussian

# ----------------------------------------------------------------------------------------------------------------------
# Dead leaves: images of discs, half of which have noise that no other image shares

def draw_leaves(n, side, seed, r_min=1.5):
    """Return the grey and the texture of n images, each (n, side, side).

    Discs are laid front to back until they cover every pixel. Their radii have density ~ r^-3 on [r_min, side]. A disc
    has its own grey, uniform in [-1, 1]. Half of the discs have white noise too, each of its own exponential strength.
    """
    rng = np.random.default_rng(seed)
    grey, texture = np.zeros((2, n, side, side), np.float32)
    covered = np.zeros(grey.shape, bool)
    y, x = np.mgrid[0:side, 0:side] + 0.5
    todo = np.arange(n)                                      # images with a pixel that no disc covers
    while len(todo):
        m = len(todo)
        u = rng.random(m)
        radius = 1 / np.sqrt(u / side**2 + (1 - u) / r_min**2)
        centre_x, centre_y = rng.uniform(-radius, side + radius, (2, m))
        d2 = (x - centre_x[:, None, None])**2 + (y - centre_y[:, None, None])**2
        which, row, column = np.nonzero((d2 < radius[:, None, None]**2) & ~covered[todo])
        image = todo[which]
        strength = rng.exponential(1, m) * (rng.random(m) < 0.5)
        grey[image, row, column] = rng.uniform(-1, 1, m)[which]
        texture[image, row, column] = strength[which] * rng.standard_normal(len(which))
        covered[image, row, column] = True
        todo = todo[~covered[todo].all((1, 2))]
    return grey, texture


def leaves(n, side, texture, seed):
    """Return (arrays, meta) of a data set of dead leaves, without labels; mean 0, variance 1.

    texture  factor of every disc's texture; 0: all discs are flat. Sets of one seed differ in nothing else but scale.
    """
    grey, detail = draw_leaves(n, side, seed)
    x = grey + texture * detail
    x = ((x - x.mean()) / x.std()).astype(np.float32)[:, None]
    return dict(x=x, y=np.zeros(n, np.int64)), dict(num_classes=1)


def draw_fields(n, side, seed):
    """Return n Gaussian fields with a 1/f spectrum as a data set, their second moments (D, D), and frequencies (D,).

    The moments are those of the density that the fields are drawn from, whose perfect denoiser is a Wiener filter.
    """
    f = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.fftfreq(side)).flatten()
    power = f.clamp(min=1 / side)**-2
    waves = torch.fft.fft2(torch.eye(side**2).view(-1, side, side), norm="ortho").flatten(1)
    moments = (waves * (power / power.mean()) @ waves.mH).real
    white = torch.randn(side**2, n, generator=torch.Generator().manual_seed(seed))
    x = (torch.linalg.cholesky(moments) @ white).T.reshape(n, 1, side, side)
    return dict(x=x.numpy(), y=np.zeros(n, np.int64)), moments, f


def small_digits():
    """Return (arrays, meta) of digits of 16 x 16 with labels, with mean 0 and variance 1."""
    x, y = small_images("mnist5k", 16)
    return dict(x=x, y=y), dict(num_classes=10)


def pick_rows(cfg, data):
    """Return the rows of the training points on which all networks are measured."""
    if not 1 < cfg.n_points <= len(data["x"]):
        raise ValueError(f"n_points must lie between 2 and {len(data['x'])}, the number of images, not {cfg.n_points}")
    return np.random.default_rng([cfg.seed, 1]).permutation(len(data["x"]))[:cfg.n_points]


# ----------------------------------------------------------------------------------------------------------------------
# Small digits, of SIDE x SIDE pixels

SIDE = 8


def small_images(name, side):
    """Return the images of a data set and their labels (N,). Digits of 28 x 28 pixels become (N, 1, side, side), with
    mean 0 and variance 1; others stay as they are."""
    data = load_data(name)
    if data["x"].shape[1:] != (1, 28, 28):
        return data["x"], data["y"]
    # a border of 2 pixels makes them 32 x 32
    x = np.pad(data["x"], ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=-1)
    x = x.reshape(-1, 1, side, 32 // side, side, 32 // side).mean((3, 5))
    return ((x - x.mean()) / x.std()).astype(np.float32), np.array(data["y"])


def warp_images(x, strength=0.15):
    """Return images (B, C, H, H) turned, sheared, scaled and shifted at random."""
    maps = torch.eye(2, 3) + strength * (2 * torch.rand(len(x), 2, 3) - 1)
    grid = F.affine_grid(maps, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def train_classifier(net, x, y, seed, warp=False, steps=800):
    """Train a network to tell the labels y of images x (arrays or memory maps), and leave it in eval mode."""
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = rng.integers(len(x), size=128)
        images = torch.from_numpy(x[rows]).float()
        images = warp_images(images) if warp else images
        F.cross_entropy(net(images), torch.from_numpy(y[rows])).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    net.eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# The teacher

class Teacher(nn.Module):
    """Tell digits by five convolutions and the mean over all places."""

    def __init__(self, places, width=48):
        super().__init__()
        self.convolutions = nn.Sequential()
        for channels in (1, width, width, width, width):
            self.convolutions.extend([nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.SiLU()])
        self.convolutions.insert(3, nn.AdaptiveAvgPool2d(places))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.convolutions(x).mean((2, 3)))

    def features(self, x):
        """Return (B, T, dim): what is seen at the place of each token of a SiT, then what is seen in the whole image.

        A token has 2 x 2 pixels. Both parts are centred and of length 1, so that both count in the cosine.
        """
        place = self.convolutions(x).flatten(2).transpose(1, 2)          # (B, T, width)
        whole = place.mean(1, keepdim=True).expand_as(place)
        centred = [part - part.mean((0, 1)) for part in (place, whole)]
        return torch.cat([F.normalize(part, dim=2) for part in centred], dim=2)


def few_digits(name, side, n_student, n_teacher, seed):
    """Return (arrays, meta) of a data set: a few small digits, without their labels, and a teacher's features of them.

    The teacher has seen n_teacher digits, these among them, warped, and the labels.
    """
    x, y = small_images(name, side)
    rows = np.random.default_rng(seed).permutation(len(x))
    if not 1 <= n_student <= n_teacher <= len(x):
        raise ValueError(f"expected 1 <= n_student <= n_teacher <= {len(x)}, not {n_student} and {n_teacher}")
    seen = rows[:n_teacher]
    torch.manual_seed(seed)
    teacher = Teacher(places=side // 2)
    train_classifier(teacher, x[seen], y[seen], seed, warp=True)
    x = x[rows[:n_student]]
    features = teacher.features(torch.from_numpy(x))
    return dict(x=x, y=np.zeros(n_student, np.int64), features=features.numpy()), dict(num_classes=1)


# ----------------------------------------------------------------------------------------------------------------------
# The judge

class Judge:
    """Measure the Frechet distance of images to those of a data set, in features of a network that tells its labels.

    It is a perceptron, not a convolutional network like the teacher. But both learned the labels of the same digits.
    """

    def __init__(self, name, side, seed):
        x, y = small_images(name, side)
        torch.manual_seed(seed + 1)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(x[0].size, 256), nn.SiLU(), nn.Linear(256, 64), nn.SiLU())
        self.net = nn.Sequential(self.body, nn.Linear(64, int(y.max()) + 1))
        train_classifier(self.net, x, y, seed + 1)
        self.moments = gaussian(self.features(x))

    def features(self, x):
        for start in range(0, len(x), 1024):
            yield self.body(torch.as_tensor(x[start:start + 1024]).float())

    def distance(self, images):
        """Return the Frechet distance of images (B, C, H, W)."""
        return frechet(*gaussian(self.features(images.cpu())), *self.moments)
