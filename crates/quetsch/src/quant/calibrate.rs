//! Calibration of static int8: what activations look like on sample sentences, and the one absmax per linear that its
//! input is quantised with; equalisation of channels where that is exact.

use crate::batch::{Batch, Encoding};
use crate::checkpoint::{Checkpoint, Stored};
use crate::cost::CostOps;
use crate::error::{Error, Result};
use crate::ops::{Hook, Inspect, With, forward};
use crate::runtime::{CpuOps, Model, Workspace};
use crate::spec::{Activation, At, Lin, Tensor};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How the absmax of a static scale is chosen from what was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Observer {
    /// The largest magnitude of all.
    MinMax,
    /// Largest magnitudes of batches of 16 sentences, averaged with weight 0.01 for the new one, as PyTorch's
    /// `MovingAverageMinMaxObserver`.
    MovingAverage,
    /// 99.99% of the magnitudes lie below it.
    #[default]
    Percentile,
    /// The least squared error of quantising what was seen.
    Mse,
    /// The least Kullback-Leibler divergence between the clipped and the quantised distribution (Migacz 2017).
    Entropy,
}

impl Observer {
    /// Every observer with its name.
    pub const ALL: [(Observer, &str); 5] = [
        (Observer::MinMax, "min-max"),
        (Observer::MovingAverage, "moving-average"),
        (Observer::Percentile, "percentile"),
        (Observer::Mse, "mse"),
        (Observer::Entropy, "entropy"),
    ];
}

impl fmt::Display for Observer {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(Observer::ALL.iter().find(|(o, _)| o == self).map_or("", |(_, name)| name))
    }
}

impl FromStr for Observer {
    type Err = Error;

    fn from_str(name: &str) -> Result<Observer> {
        let names = Observer::ALL.map(|(_, n)| n).join(", ");
        let found = Observer::ALL.iter().find(|(_, n)| *n == name).map(|(o, _)| *o);
        found.ok_or_else(|| Error::invalid(format!("unknown observer {name:?}, expected one of {names}")))
    }
}

/// Sentences of a batch, and of a step of the moving average.
const BATCH: usize = 16;
/// Bins of a histogram: TensorRT's.
const BINS: usize = 2048;
/// Magnitudes that int8 tells apart besides zero.
const LEVELS: usize = 127;

/// What was seen of one activation.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Largest magnitude by channel.
    pub channels: Vec<f32>,
    moving: Option<f32>,
    /// Magnitudes in bins of equal width.
    bins: Vec<u64>,
    width: f32,
}

impl Seen {
    /// Takes in rows of `columns` values.
    pub fn add(&mut self, values: &[f32], columns: usize) {
        self.channels.resize(columns, 0.0);
        let mut largest = 0.0f32;
        for row in values.chunks_exact(columns.max(1)) {
            for (c, v) in self.channels.iter_mut().zip(row) {
                *c = c.max(v.abs());
                largest = largest.max(v.abs());
            }
        }
        self.moving = Some(self.moving.map_or(largest, |m| m + 0.01 * (largest - m)));
        self.make_room(largest);
        if self.width > 0.0 {
            values.iter().for_each(|v| self.bins[((v.abs() / self.width) as usize).min(BINS - 1)] += 1);
        }
    }

    /// Doubles the bins' width, merging pairs, until `largest` has its place.
    fn make_room(&mut self, largest: f32) {
        self.bins.resize(BINS, 0);
        if self.width == 0.0 {
            self.width = largest / BINS as f32;
        }
        while self.width > 0.0 && largest > self.width * BINS as f32 {
            for i in 0..BINS {
                self.bins[i] = if i < BINS / 2 { self.bins[2 * i] + self.bins[2 * i + 1] } else { 0 };
            }
            self.width *= 2.0;
        }
    }

    /// The largest magnitude.
    pub fn max(&self) -> f32 {
        self.channels.iter().fold(0.0, |m, c| m.max(*c))
    }

    /// Channels that reach a threshold: the outlier columns of LLM.int8(), which has none at 0.
    pub fn outliers(&self, threshold: f32) -> usize {
        self.channels.iter().filter(|c| threshold > 0.0 && **c >= threshold).count()
    }

    /// The absmax to quantise with: what is larger is clipped.
    pub fn absmax(&self, observer: Observer) -> f32 {
        let clip = match observer {
            Observer::MinMax => return self.max(),
            Observer::MovingAverage => self.moving.unwrap_or(0.0),
            Observer::Percentile => self.percentile(0.9999),
            Observer::Mse => self.least(|clip| self.squared_error(clip)),
            Observer::Entropy => self.least(|clip| self.divergence(clip)),
        };
        clip.min(self.max())
    }

    fn percentile(&self, share: f64) -> f32 {
        let wanted = (share * self.bins.iter().sum::<u64>() as f64).ceil() as u64;
        let mut below = 0;
        let bin = self.bins.iter().position(|n| {
            below += n;
            below >= wanted
        });
        bin.map_or(0.0, |b| (b + 1) as f32 * self.width)
    }

    /// The number of bins to keep at which a loss is least, as a magnitude.
    fn least(&self, loss: impl Fn(usize) -> f64) -> f32 {
        let used = self.bins.iter().rposition(|n| *n > 0).map_or(0, |b| b + 1);
        let candidates = (LEVELS + 1..=used).step_by(8).chain([used]);
        let best = candidates.map(|c| (c, loss(c))).min_by(|a, b| a.1.total_cmp(&b.1));
        best.map_or(0.0, |(c, _)| c as f32 * self.width)
    }

    /// Of rounding every bin's middle to steps of `clip / 127`.
    fn squared_error(&self, clip: usize) -> f64 {
        let step = clip as f64 / LEVELS as f64;
        let error = |(i, n): (usize, &u64)| {
            let x = i as f64 + 0.5;
            let q = (x / step).round().min(LEVELS as f64) * step;
            *n as f64 * (x - q) * (x - q)
        };
        self.bins.iter().enumerate().map(error).sum()
    }

    /// KL(P || Q): P the first `clip` bins with all that lies above in the last one, Q the same bins without it, each
    /// group of one integer level spread evenly over its bins that are not empty.
    fn divergence(&self, clip: usize) -> f64 {
        let kept = &self.bins[..clip];
        let above: u64 = self.bins[clip..].iter().sum();
        let total = (kept.iter().sum::<u64>() + above).max(1) as f64;
        let (inside, mut sum) = (kept.iter().sum::<u64>().max(1) as f64, 0.0);
        for level in 0..=LEVELS {
            let (from, to) = (level * clip / (LEVELS + 1), (level + 1) * clip / (LEVELS + 1));
            let group = &kept[from..to];
            let filled = group.iter().filter(|n| **n > 0).count().max(1) as f64;
            let q = group.iter().sum::<u64>() as f64 / filled / inside;
            for (i, n) in group.iter().enumerate() {
                let extra = if from + i + 1 == clip { above } else { 0 };
                let p = (n + extra) as f64 / total;
                if p > 0.0 {
                    // A bin that only holds what was clipped has no counterpart: as unlikely as can be.
                    sum += p * (p / if *n > 0 { q } else { 1e-12 }).ln();
                }
            }
        }
        sum
    }
}

struct Watch<'a> {
    /// Number of channels of the activations that linears read.
    wanted: &'a BTreeMap<At, usize>,
    seen: BTreeMap<At, Seen>,
}

impl<O: Inspect> Hook<O> for &mut Watch<'_> {
    fn at(&mut self, ops: &mut O, at: At, x: O::Act) -> O::Act {
        if let Some(&columns) = self.wanted.get(&at) {
            self.seen.entry(at).or_default().add(&ops.values(&x), columns);
        }
        x
    }
}

/// What the input of every linear looks like on these sentences, in the checkpoint as it is.
///
/// # Errors
/// A sentence that the model cannot read.
pub fn observe(ck: &Checkpoint, sentences: &[Encoding]) -> Result<BTreeMap<Lin, Seen>> {
    let readers = CostOps::run(&ck.spec, &[1])?.readers;
    let sizes: BTreeMap<Lin, usize> = ck.spec.linears().into_iter().map(|(s, _, k)| (s, k)).collect();
    let wanted: BTreeMap<At, usize> =
        readers.iter().filter_map(|(at, r)| Some((*at, *sizes.get(r.linears.first()?)?))).collect();
    let (model, mut ws) = (Model::pack(ck), Workspace::default());
    let mut watch = Watch { wanted: &wanted, seen: BTreeMap::new() };
    for sentences in sentences.chunks(BATCH) {
        let batch = Batch::new(&ck.spec, sentences)?;
        let mut ops = CpuOps::new(&model, &mut ws);
        forward(&mut With { ops: &mut ops, hook: &mut watch }, &ck.spec, &batch);
    }
    let of = |(at, seen): (At, Seen)| {
        let linears = readers[&at].linears.iter();
        linears.map(|lin| (*lin, seen.clone())).collect::<Vec<_>>()
    };
    Ok(watch.seen.into_iter().flat_map(of).collect())
}

/// Rows for calibration: at regular distances in the order of label and length, so that every label has its share and
/// every label's short and long texts are there. Ascending.
pub fn choose(labels: &[u32], sentences: &[Encoding], wanted: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sentences.len()).collect();
    order.sort_by_key(|&i| (labels.get(i), sentences[i].ids.len(), i));
    let n = wanted.min(order.len());
    // The middle of each of n equal stretches.
    let mut rows: Vec<usize> = (0..n).map(|i| order[(2 * i + 1) * order.len() / (2 * n)]).collect();
    rows.sort_unstable();
    rows
}

/// Moves range from the channels of an activation to the columns of the weight that reads it (SmoothQuant, Xiao et al.
/// 2023, with alpha 0.5; cross-layer equalisation, Nagel et al. 2019): a producing row and its bias are divided by s, the
/// reading column multiplied, s = sqrt(max |x| / max |w|), rounded to a power of two so that not a bit of the float
/// result changes.
///
/// Only where nothing else reads the activation and nothing but a positive factor passes between: values to the
/// attention output, and ReLU's neighbours. A LayerNorm's output cannot be scaled: in post-LayerNorm BERT the residual
/// reads it too.
///
/// # Errors
/// A weight that is quantised already.
pub fn equalise(ck: &Checkpoint, seen: &BTreeMap<Lin, Seen>) -> Result<Checkpoint> {
    let spec = &ck.spec;
    let relu = spec.ffn_activation == Activation::Relu;
    let layers = 0..spec.layers.len();
    let mut pairs: Vec<(Lin, Lin)> = layers.clone().map(|l| (Lin::Value(l), Lin::Out(l))).collect();
    pairs.extend(layers.filter(|_| relu).map(|l| (Lin::Up(l), Lin::Down(l))));
    if spec.head_flow().is_some_and(|f| f.activation == Activation::Relu) {
        pairs.push((Lin::HeadDense, Lin::Classifier));
    }
    let mut out = ck.clone();
    for (producer, reader) in pairs {
        let Some(seen) = seen.get(&reader) else { continue };
        let factors = factors(ck, reader, &seen.channels);
        scale(&mut out, Tensor::W(producer), |i, columns| 1.0 / factors[i / columns], factors.len())?;
        scale(&mut out, Tensor::B(producer), |i, _| 1.0 / factors[i], factors.len())?;
        scale(&mut out, Tensor::W(reader), |i, _| factors[i % factors.len()], factors.len())?;
    }
    Ok(out)
}

/// What every column of a weight is multiplied by.
fn factors(ck: &Checkpoint, reader: Lin, channels: &[f32]) -> Vec<f32> {
    let w = ck.values(Tensor::W(reader));
    let mut columns = vec![0.0f32; channels.len()];
    for row in w.chunks_exact(channels.len().max(1)) {
        columns.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
    }
    let factor = |(x, w): (&f32, &f32)| match (x / w).sqrt().log2().round() {
        power if power.is_finite() => power.clamp(-10.0, 10.0).exp2(),
        _ => 1.0, // a channel or a column of zeros
    };
    channels.iter().zip(&columns).map(factor).collect()
}

fn scale(ck: &mut Checkpoint, t: Tensor, by: impl Fn(usize, usize) -> f32, channels: usize) -> Result<()> {
    let Stored::Float { dtype, data } = ck.get(t) else {
        return Err(Error::invalid(format!("{} is quantised: equalise the float model", ck.spec.name(t))));
    };
    let (dtype, columns) = (*dtype, data.len() / channels.max(1));
    let data = data.iter().enumerate().map(|(i, v)| dtype.round(v * by(i, columns))).collect();
    ck.set(t, Stored::Float { dtype, data });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    fn normal(n: usize) -> Vec<f32> {
        let mut rng = Rng::new(7);
        (0..n).map(|_| rng.normal()).collect()
    }

    #[test]
    fn observers_choose_what_they_say() {
        // 100,000 normal values and one far away: in batches that raise the range on the way.
        let mut values = normal(100_000);
        values[70_000] = 40.0;
        let mut seen = Seen::default();
        values.chunks(10_000).for_each(|part| seen.add(part, 10));
        assert_eq!(seen.absmax(Observer::MinMax), 40.0);
        assert_eq!((seen.outliers(6.0), seen.channels[0]), (1, 40.0));
        let mut sorted: Vec<f32> = values.iter().map(|v| v.abs()).collect();
        sorted.sort_by(f32::total_cmp);
        let width = 40.0 / 1024.0; // at most: the range had to double
        let exact = sorted[99_989];
        let percentile = seen.absmax(Observer::Percentile);
        assert!((percentile - exact).abs() <= 2.0 * width, "{percentile}, exactly {exact}");
        // The least squared error, found by trying.
        let error = |clip: f32| -> f64 {
            let q = |v: f32| (v / clip * 127.0).round().clamp(-127.0, 127.0) * clip / 127.0;
            values.iter().map(|v| f64::from(v - q(*v)).powi(2)).sum()
        };
        let mse = seen.absmax(Observer::Mse);
        let best = (1..=100).map(|i| error(0.4 * i as f32)).fold(f64::MAX, f64::min);
        assert!(error(mse) <= 1.05 * best, "{mse}: {} against {best}", error(mse));
        // The first batches end near 4; a hundredth of the way to 40, once.
        let moving = seen.absmax(Observer::MovingAverage);
        assert!((3.0..6.0).contains(&moving), "{moving}");
        let entropy = seen.absmax(Observer::Entropy);
        assert!((2.0..20.0).contains(&entropy), "{entropy}");
        for (observer, name) in Observer::ALL {
            assert_eq!((observer.to_string().as_str(), name.parse().unwrap()), (name, observer));
        }
        let mut nothing = Seen::default();
        nothing.add(&[0.0; 8], 4);
        assert!(Observer::ALL.iter().all(|(o, _)| nothing.absmax(*o) == 0.0));
    }

    #[test]
    fn samples_cover_labels_and_lengths() {
        let sentence = |n| Encoding { ids: vec![0; n], types: vec![] };
        let sentences: Vec<_> = (0..60).map(|i| sentence(1 + i / 2)).collect();
        let labels: Vec<u32> = (0..60).map(|i| u32::from(i % 3 == 0)).collect();
        let rows = choose(&labels, &sentences, 12);
        assert_eq!(rows.len(), 12);
        assert_eq!(rows.iter().filter(|r| labels[**r] == 1).count(), 4, "a third, as in the whole");
        let long = |label| rows.iter().filter(|r| labels[**r] == label && sentences[**r].ids.len() > 15).count();
        assert_eq!((long(0), long(1)), (4, 2), "half of each label");
        assert_eq!(choose(&labels, &sentences, 100), (0..60).collect::<Vec<_>>());
    }
}
