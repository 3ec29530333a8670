//! config.json beside model.safetensors, or beside an index and a shard. The parts of an input are parted by two zero
//! bytes, which JSON has nowhere: one separator for a single file, two for an index between config and shard.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch::dir::WEIGHTS;
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

const END: &[u8] = &[0, 0];
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "a.safetensors";

static PLACE: LazyLock<PathBuf> = LazyLock::new(quetsch_fuzz::folder);

fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = data.windows(2).position(|w| w == END)?;
    Some((&data[..at], &data[at + 2..]))
}

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let Some((config, rest)) = split(data) else { return };
        let write = |name: &str, bytes: &[u8]| fs::write(PLACE.join(name), bytes).expect("a file in memory");
        write("config.json", config);
        match rest.first() {
            Some(b'{') => {
                let Some((index, shard)) = split(rest) else { return };
                let _ = fs::remove_file(PLACE.join(WEIGHTS));
                write(INDEX, index);
                write(SHARD, shard);
            }
            _ => write(WEIGHTS, rest),
        }
        quetsch_fuzz::read_model(&PLACE);
    }
);

fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = vec![];
    for ck in quetsch_fuzz::schemes() {
        let (config, weights) = quetsch_fuzz::files(&ck);
        if !ck.is_quantised() {
            let names = ck.tensors().map(|(def, _)| (def.name, SHARD.into())).collect::<serde_json::Map<_, _>>();
            let index = serde_json::json!({ "weight_map": names }).to_string();
            seeds.push([&config, END, index.as_bytes(), END, &weights].concat());
        }
        seeds.push([&config, END, &weights].concat());
    }
    seeds
}
