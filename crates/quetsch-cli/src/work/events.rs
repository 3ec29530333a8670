//! TensorBoard event files: the scalars of a training, readable by `tensorboard --logdir` while it runs.
//!
//! A file is a row of TFRecords: length (u64, little endian), masked CRC-32C of its bytes, payload, masked CRC-32C of
//! the payload; a mask rotates the sum right by 15 bits and adds 0xa282ead8. Payloads are `tensorflow.Event` messages
//! (tensorflow/core/util/event.proto), the first one with the version `brain.Event:2`.

use anyhow::{Context, Result};
use prost::{Message, Oneof};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The name in a stage's folder; TensorBoard looks for `tfevents` in it.
pub const FILE: &str = "events.out.tfevents.quetsch";

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Scalar>,
}

/// `Summary.Value` with its `simple_value`.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    /// Written even if it is 0: it is one of a `oneof`, and TensorBoard leaves out a value that has none.
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

/// An event file being written.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Starts a file, or goes on with one: of steps that occur twice TensorBoard shows the later.
    pub fn open(path: &Path, resume: bool) -> Result<Events> {
        let cannot = || format!("cannot write {}", path.display());
        let is_new = !resume || !path.exists();
        let mut options = OpenOptions::new();
        let file = options.create(true).append(!is_new).write(true).truncate(is_new).open(path);
        let mut events = Events { path: path.into(), file: file.with_context(cannot)? };
        if is_new {
            events.write(0, What::FileVersion("brain.Event:2".into()))?;
        }
        Ok(events)
    }

    /// Scalars by tag at a step.
    pub fn scalars<'a>(&mut self, step: usize, values: impl IntoIterator<Item = (&'a str, f64)>) -> Result<()> {
        let value = |(tag, x): (&str, f64)| Scalar { tag: tag.into(), simple_value: Some(x as f32) };
        self.write(step, What::Summary(Summary { value: values.into_iter().map(value).collect() }))
    }

    fn write(&mut self, step: usize, what: What) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        let event = Event { wall_time, step: step as i64, what: Some(what) };
        // One write a record: a killed run leaves none cut in two.
        let written = self.file.write_all(&record(&event.encode_to_vec()));
        written.with_context(|| format!("cannot write {}", self.path.display()))
    }
}

/// A TFRecord.
fn record(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    [&length[..], &masked(&length).to_le_bytes(), payload, &masked(payload).to_le_bytes()].concat()
}

fn masked(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The payloads of a file, every sum checked.
    fn read(bytes: &[u8]) -> Vec<Event> {
        let (mut at, mut events) = (0, vec![]);
        let four = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        while at < bytes.len() {
            let head = &bytes[at..at + 8];
            let length = u64::from_le_bytes(head.try_into().expect("eight bytes")) as usize;
            assert_eq!(four(at + 8), masked(head), "sum of the length at {at}");
            let payload = &bytes[at + 12..at + 12 + length];
            assert_eq!(four(at + 12 + length), masked(payload), "sum of the payload at {at}");
            events.push(Event::decode(payload).expect("an event"));
            at += 16 + length;
        }
        events
    }

    #[test]
    fn a_file_reads_back() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join(FILE);
        Events::open(&path, false).and_then(|mut e| e.scalars(1, [("loss", 2.5), ("kl", 0.0)])).expect("written");
        Events::open(&path, true).and_then(|mut e| e.scalars(2, [("loss", 0.5)])).expect("gone on");
        let events = read(&std::fs::read(&path).expect("a file"));
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        let Some(What::Summary(summary)) = &events[1].what else { panic!("{:?}", events[1]) };
        let values: Vec<_> = summary.value.iter().map(|v| (v.tag.as_str(), v.simple_value)).collect();
        assert_eq!(
            (events[1].step, values),
            (1, vec![("loss", Some(2.5)), ("kl", Some(0.0))]),
            "a 0 is a value, too"
        );
        assert_eq!(events[2].step, 2);
    }

    /// The check value of CRC-32C (RFC 3720, B.4: 32 bytes of zero), masked.
    #[test]
    fn the_sum_is_the_masked_crc32c() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(&[0; 32]), 0x8a91_36aau32.rotate_right(15).wrapping_add(0xa282_ead8));
        assert_eq!(record(b"").len(), 16);
    }
}
