//! pytorch_model.bin. An even first byte: the rest is the file. An odd one: the rest is the pickle program in a zip
//! archive with one storage, so that programs are changed and not checked lengths of the archive.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

const FILE: &str = "tiny_bert_pytorch_model.bin";
static PLACE: LazyLock<PathBuf> = LazyLock::new(|| {
    let place = quetsch_fuzz::folder();
    let config = quetsch_fuzz::root().join("fixtures/tiny_bert/config.json");
    fs::copy(config, place.join("config.json")).expect("the fixture");
    place
});

/// A zip archive of entries that are stored uncompressed.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (vec![], vec![]);
    for (name, data) in entries {
        let (size, start) = ((data.len() as u32).to_le_bytes(), (file.len() as u32).to_le_bytes());
        let length = (name.len() as u16).to_le_bytes();
        let common = [&[10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..], &size, &size, &length, &[0, 0]].concat();
        file.extend([b"PK\x03\x04", &common[..], name.as_bytes(), data].concat());
        directory.extend([b"PK\x01\x02\x0a\0", &common[..], &[0; 10], &start, name.as_bytes()].concat());
    }
    let (count, size) = ((entries.len() as u16).to_le_bytes(), (directory.len() as u32).to_le_bytes());
    let start = (file.len() as u32).to_le_bytes();
    [&file[..], &directory, b"PK\x05\x06\0\0\0\0", &count, &count, &size, &start, &[0, 0]].concat()
}

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let Some((kind, rest)) = data.split_first() else { return };
        let storage = [0; 4096];
        let file = match kind % 2 {
            0 => rest.to_vec(),
            _ => zip(&[("a/data.pkl", rest), ("a/byteorder", b"little"), ("a/data/0", &storage)]),
        };
        fs::write(PLACE.join("pytorch_model.bin"), file).expect("a file in memory");
        let _ = quetsch::dir::read_checkpoint(&*PLACE);
    }
);

/// The fixture's file, its program, and one with the first of its tensors.
fn seeds() -> Vec<Vec<u8>> {
    let file = fs::read(quetsch_fuzz::root().join("fixtures").join(FILE)).expect("the fixture");
    let start = file.windows(8).position(|w| w == b"data.pkl").expect("a program");
    // The local header ends with a field of padding, whose length stands before the name.
    let name = file[..start].windows(4).rposition(|w| w == b"PK\x03\x04").expect("a header");
    let length = |at: usize| u16::from_le_bytes([file[at], file[at + 1]]) as usize;
    let begin = name + 30 + length(name + 26) + length(name + 28);
    let size = file[begin..].windows(4).position(|w| w == b"PK\x07\x08" || w == b"PK\x03\x04").expect("an end");
    let program = &file[begin..begin + size];
    let small = zip(&[("a/data.pkl", &program[..program.len().min(2000)]), ("a/data/0", &[0; 64])]);
    vec![[&[0], &file[..]].concat(), [&[1], program].concat(), [&[0], &small[..]].concat()]
}
