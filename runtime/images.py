"""placeholder until the images branch lands"""
import numpy as np
FLOAT_RULES = ("lerobot", "lerobot-0.4", "lerobot-0.3")
def _axis(n, m):
    x = np.maximum((np.arange(m, dtype=np.float32) + np.float32(.5)) * np.float32(n / m) - np.float32(.5), 0)
    i = np.minimum(x.astype(int), n - 1); j = np.minimum(i + 1, n - 1); w = (x - i).astype(np.float32)
    return i, j, w
def resize_float(image, height, width, rule):
    x = image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image
    if x.shape[:2] != (height, width):
        ratio = max(x.shape[1] / width, x.shape[0] / height)
        h, w = int(x.shape[0] / ratio), int(x.shape[1] / ratio)
        i, j, a = _axis(x.shape[0], h); k, l, b = _axis(x.shape[1], w); a = a[:, None, None]; b = b[None, :, None]
        y = (1-a) * ((1-b) * x[i][:, k] + b * x[i][:, l]) + a * ((1-b) * x[j][:, k] + b * x[j][:, l])
        out = np.full((height, width, 3), -1 if rule == "lerobot-0.4" else 0, np.float32)
        t, s = ((height - h), (width - w)) if rule == "lerobot-0.3" else ((height - h) // 2, (width - w) // 2)
        out[t:t+h, s:s+w] = y; x = out
    return x * np.float32(2) - np.float32(1)
