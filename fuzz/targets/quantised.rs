//! Entries of quantised tensors that do not fit together, in a file that is otherwise whole: an input is a number of
//! edits (tensor, kind, length, bytes) of a small model that is stored in one of the schemes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::dir::WEIGHTS;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

type Entry = (String, Dtype, Vec<usize>, Vec<u8>);

static PLACE: LazyLock<PathBuf> = LazyLock::new(quetsch_fuzz::folder);
/// Config and entries of every scheme.
static MODELS: LazyLock<Vec<(Vec<u8>, Vec<Entry>)>> = LazyLock::new(|| {
    let entries = |weights: &[u8]| {
        let file = SafeTensors::deserialize(weights).expect("what was written");
        let entry =
            |(name, t): (&str, TensorView)| (name.to_owned(), t.dtype(), t.shape().to_vec(), t.data().to_vec());
        let mut all: Vec<Entry> = file.iter().map(entry).collect();
        // Entries beside a quantised weight first: they are what can disagree.
        all.sort_by_key(|(name, ..)| (name.ends_with(".bias") || name.contains("LayerNorm"), name.clone()));
        all
    };
    let models = quetsch_fuzz::schemes().filter(|ck| ck.is_quantised()).map(|ck| quetsch_fuzz::files(&ck));
    models.map(|(config, weights)| (config, entries(&weights))).collect()
});
const TYPES: [Dtype; 8] =
    [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::I8, Dtype::U8, Dtype::I32, Dtype::F64, Dtype::BOOL];

fn edit(entry: &mut Entry, kind: u8, bytes: &[u8]) {
    let (_, dtype, shape, data) = entry;
    let first = bytes.first().copied().unwrap_or(0) as usize;
    match kind % 5 {
        // Another type, as many bytes.
        0 => *dtype = TYPES[first % TYPES.len()],
        // Other bytes somewhere.
        1 => {
            let from = first % data.len().max(1);
            data[from..].iter_mut().zip(&bytes[1.min(bytes.len())..]).for_each(|(d, b)| *d = *b);
        }
        // Other content altogether, such as another quant_state.
        2 => *data = bytes.to_vec(),
        // Shorter or longer.
        3 => data.resize(first, bytes.last().copied().unwrap_or(0)),
        // Another shape.
        _ => *shape = bytes.iter().map(|b| *b as usize).collect(),
    }
    let elements = data.len() / (dtype.bitsize() / 8);
    data.truncate(elements * (dtype.bitsize() / 8));
    if shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) != Some(elements) {
        *shape = if shape.len() > 1 { vec![elements, 1] } else { vec![elements] };
    }
}

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let Some((which, mut rest)) = data.split_first() else { return };
        let (config, entries) = &MODELS[*which as usize % MODELS.len()];
        let mut entries = entries.clone();
        while let [tensor, kind, length, more @ ..] = rest {
            let (bytes, more) = more.split_at((*length as usize).min(more.len()));
            let place = *tensor as usize % entries.len();
            match kind {
                255 => drop(entries.remove(place)),
                _ => edit(&mut entries[place], *kind, bytes),
            }
            if entries.is_empty() {
                return;
            }
            rest = more;
        }
        let views = entries.iter().map(|(name, dtype, shape, data)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).expect("shape and bytes agree"))
        });
        let weights = safetensors::serialize(views, None).expect("a file");
        fs::write(PLACE.join("config.json"), config).expect("a file in memory");
        fs::write(PLACE.join(WEIGHTS), weights).expect("a file in memory");
        quetsch_fuzz::read_model(&PLACE);
    }
);

/// One edit of every entry of every model; a quant_state is replaced by itself, to be changed from there.
fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![];
    for (m, (_, entries)) in MODELS.iter().enumerate() {
        for (e, (name, _, _, data)) in entries.iter().enumerate().filter(|(_, e)| !e.0.ends_with(".bias")) {
            if name.contains("quant_state") {
                seeds.push([&[m as u8, e as u8, 2, data.len() as u8], &data[..]].concat());
            } else {
                seeds.push(vec![m as u8, e as u8, e as u8, 4, 0, 0, 192, 127]); // a NaN
            }
        }
    }
    seeds
}
