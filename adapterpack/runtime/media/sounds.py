"""Makes what models hear of the samples of a sound, as transformers' feature extractors do: samples, or mel
features of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError, Unsupported
from ...io import Config

LONGEST = 120
"""The most seconds of a sound for a model that hears any length: its attention grows with their square."""
_WINDOW = 400
_STEP = 160
_SIZE = 512
"""Samples of a frame, between frames, and of its Fourier transform in Kaldi's filter banks at 16 kHz."""
_SMALLEST = float(np.finfo(np.float32).eps)

Extractor = Callable[[np.ndarray, Sequence[Any], Config], np.ndarray]
"""(samples in [-1, 1), the shape of one row of the graph's input, the feature extractor's settings) -> the
row.
"""


def rate_of(config: Config) -> int:
    """Returns the sampling rate that a model hears."""
    return int(config.get("sampling_rate", 16000))


def features_of(samples: np.ndarray, shape: Sequence[Any], config: Config, where: object) -> np.ndarray:
    """Returns one row of a graph's input, made of samples as the ``feature_extractor`` section says.

    Raises:
        Unsupported: the model's feature extractor is of an unknown kind.
        ConfigError: the sound is too long or too short for the model.
    """
    name = str(config.get("feature_extractor_type") or _USUAL)
    if name not in EXTRACTORS:
        raise Unsupported(
            "how the model's sounds are prepared is not known",
            where=where,
            expected=", ".join(EXTRACTORS),
            found=name,
            remedy="save what the model's processor gives for it as a .npy file",
        )
    seconds = len(samples) / rate_of(config)
    if not isinstance(shape[0], int) and not _WINDOW / 16000 <= seconds <= LONGEST:
        raise ConfigError(
            "the sound is too short or too long for this model",
            where=where,
            expected=f"0.025 to {LONGEST} seconds",
            found=f"{seconds:.3g} seconds",
            remedy="divide it" if seconds > 1 else None,
        )
    return np.ascontiguousarray(EXTRACTORS[name](samples, shape, config), np.float32)


def _samples(samples: np.ndarray, shape: Sequence[Any], config: Config) -> np.ndarray:
    """Returns samples with mean 0 and variance 1, or as they are."""
    if not config.get("do_normalize", True):
        return samples
    normalized: np.ndarray = (samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)
    return normalized


def _whisper(samples: np.ndarray, shape: Sequence[Any], config: Config) -> np.ndarray:
    """Returns log-mel features ``[mel, frames]`` by the formula of Radford et al. 2022
    (https://arxiv.org/abs/2212.04356), section 2.2: log10 of the power in Slaney's mel bands, at least its
    maximum minus 8, then plus 4 and divided by 4.
    """
    size, step = (int(config.get(key, usual)) for key, usual in (("n_fft", 400), ("hop_length", 160)))
    mels, frames = shape
    if not isinstance(mels, int) or not isinstance(frames, int):
        raise Unsupported(
            "this graph takes speech of any length, whose features only its own processor knows",
            remedy="save what the model's processor gives for it as a .npy file",
        )
    if len(samples) > frames * step:
        raise ConfigError(
            "the sound is longer than what the model hears at once",
            expected=f"at most {frames * step / rate_of(config):g} seconds",
            found=f"{len(samples) / rate_of(config):.4g} seconds",
            remedy="divide it",
        )
    padded = np.pad(np.pad(samples, (0, frames * step - len(samples))), size // 2, mode="reflect")
    window = np.hanning(size + 1)[:-1]
    places = np.arange(frames)[:, None] * step + np.arange(size)
    power = np.abs(np.fft.rfft(padded[places] * window)) ** 2
    loud = np.log10(np.maximum(mel_bands(mels, size, rate_of(config)) @ power.T, 1e-10))
    features: np.ndarray = (np.maximum(loud, loud.max() - 8) + 4) / 4
    return features


def mel_bands(count: int, size: int, rate: int) -> np.ndarray:
    """Returns triangular mel filters over the frequencies of a spectrum, ``[count, size // 2 + 1]``, each of
    area 1, on Slaney's scale: linear below 1 kHz.

    Example:
        >>> mel_bands(80, 400, 16000).shape
        (80, 201)
    """
    highest = 15 + 27 * np.log(rate / 2 / 1000) / np.log(6.4)
    mels = np.linspace(0, highest, count + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, rate / 2, size // 2 + 1)
    return _triangles(bins, edges) * (2 / (edges[2:] - edges[:-2]))[:, None]


def _triangles(places: np.ndarray, edges: np.ndarray) -> np.ndarray:
    rising = (places - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - places) / np.diff(edges)[1:, None]
    triangles: np.ndarray = np.maximum(0, np.minimum(rising, falling))
    return triangles


def _filter_bank(samples: np.ndarray, bands: int, rate: int, window: np.ndarray) -> np.ndarray:
    """Returns the log energies ``[frames, bands]`` of Kaldi's filter bank: frames without their mean, with a
    pre-emphasis of 0.97, and triangles on the mel scale from 20 Hz on.
    """
    starts = np.arange(max(0, 1 + (len(samples) - _WINDOW) // _STEP))
    frames = samples[starts[:, None] * _STEP + np.arange(_WINDOW)]
    frames = frames - frames.mean(1, keepdims=True)
    frames = np.concatenate([frames[:, :1] * 0.03, frames[:, 1:] - 0.97 * frames[:, :-1]], 1)
    power = np.abs(np.fft.rfft(frames * window, _SIZE)) ** 2
    low, high, places = (
        1127 * np.log(1 + np.asarray(hertz) / 700)
        for hertz in (20, rate // 2, np.arange(_SIZE // 2 + 1) * rate / _SIZE)
    )
    energies = power @ _triangles(places, np.linspace(low, high, bands + 2)).T
    logarithms: np.ndarray = np.log(np.maximum(energies, _SMALLEST))
    return logarithms


def _spectrogram_transformer(samples: np.ndarray, shape: Sequence[Any], config: Config) -> np.ndarray:
    """Returns a filter bank of as many frames as the model takes, normalised by the data set's moments."""
    frames, bands = shape
    bank = _filter_bank(samples, bands, rate_of(config), np.hanning(_WINDOW))[:frames]
    bank = np.pad(bank, ((0, frames - len(bank)), (0, 0)))
    if not config.get("do_normalize", True):
        return bank
    normalized: np.ndarray = (bank - config.get("mean", -4.2677393)) / (2 * config.get("std", 4.5689974))
    return normalized


def _seamless(samples: np.ndarray, shape: Sequence[Any], config: Config) -> np.ndarray:
    """Returns a filter bank with mean 0 and variance 1 in each band, of which ``stride`` frames are one."""
    stride = int(config.get("stride", 2))
    window = np.hanning(_WINDOW) ** 0.85  # Povey's
    bank = _filter_bank(samples * 2**15, shape[1] // stride, rate_of(config), window)
    bank = (bank - bank.mean(0)) / np.sqrt(bank.var(0, ddof=1) + 1e-7)
    joined: np.ndarray = bank[: len(bank) // stride * stride].reshape(-1, shape[1])
    return joined


_USUAL = "WhisperFeatureExtractor"
EXTRACTORS: dict[str, Extractor] = {
    _USUAL: _whisper,
    "Wav2Vec2FeatureExtractor": _samples,
    "ASTFeatureExtractor": _spectrogram_transformer,
    "SeamlessM4TFeatureExtractor": _seamless,
}
"""transformers' feature extractors that this module computes, by their names."""
