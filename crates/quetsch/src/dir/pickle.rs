//! `pytorch_model.bin`: the zip archive that `torch.save` writes since version 1.6, read without running anything.
//!
//! A pickle is a program for a stack machine, and its danger is the instruction that calls any Python function. This
//! machine knows the instructions that a state dict needs and the four names in it: ordered dicts, tensors, parameters
//! and storages. Every other name is an error that says so. Tensors are not copied: what is returned are byte ranges
//! of the file, as for safetensors, because torch stores them uncompressed.

use super::shards::Found;
use safetensors::Dtype;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// Longer programs than this are no state dict of an encoder.
const LONGEST_PICKLE: usize = 64 << 20;

/// Name, type, shape and byte range of every tensor of the file.
pub fn tensors(file: &[u8]) -> Result<Found, String> {
    if !file.starts_with(b"PK") {
        return Err("no zip archive as torch.save writes it since version 1.6".into());
    }
    let entries = zip(file)?;
    let one = |ending: &str| {
        let found = entries.iter().find(|(name, _)| name.split_once('/').is_some_and(|(_, rest)| rest == ending));
        found.map(|(_, range)| range.clone())
    };
    let Some(program) = one("data.pkl") else {
        return Err("a zip archive without data.pkl: not what torch.save writes".into());
    };
    if let Some(order) = one("byteorder").map(|r| &file[r]).filter(|order| *order != b"little") {
        return Err(format!("byteorder is {:?}, expected little", String::from_utf8_lossy(order)));
    }
    let program = file.get(program).unwrap_or_default();
    if program.len() > LONGEST_PICKLE {
        return Err(format!("data.pkl is {} bytes long, expected at most {LONGEST_PICKLE}", program.len()));
    }
    let mut machine =
        Machine { code: program, at: 0, values: vec![], stack: vec![], marks: vec![], memo: HashMap::new() };
    let top = machine.run().map_err(|e| format!("data.pkl, byte {}: {e}", machine.at))?;
    let Value::Dict(items) = &machine.values[top] else {
        return Err("data.pkl holds no dict of tensors".into());
    };
    let mut found = vec![];
    for (key, value) in items {
        let (Value::Text(name), Value::Tensor(t)) = (&machine.values[*key], &machine.values[*value]) else {
            return Err("data.pkl holds something else than named tensors: not a bare state dict".into());
        };
        let size = t.dtype.bitsize() / 8;
        let elements = t.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
        let bytes = elements.and_then(|n| n.checked_mul(size));
        let from = t.offset.checked_mul(size);
        let (Some(bytes), Some(from)) = (bytes, from) else {
            return Err(format!("tensor {name}: shape {:?} is too large", t.shape));
        };
        let storage =
            one(&format!("data/{}", t.storage)).ok_or(format!("tensor {name}: no storage {:?}", t.storage))?;
        if from.checked_add(bytes).is_none_or(|end| end > storage.len()) {
            return Err(format!(
                "tensor {name}: {bytes} bytes from {from} on, but storage {:?} has {}",
                t.storage,
                storage.len()
            ));
        }
        if !is_contiguous(&t.shape, &t.stride) {
            return Err(format!("tensor {name}: shape {:?} with strides {:?} is not row-major", t.shape, t.stride));
        }
        let start = storage.start + from;
        found.push((name.clone(), t.dtype, t.shape.clone(), start..start + bytes));
    }
    Ok(found)
}

fn is_contiguous(shape: &[usize], stride: &[usize]) -> bool {
    let mut expected = 1usize;
    shape.len() == stride.len()
        && shape.iter().zip(stride).rev().all(|(&n, &s)| {
            let ok = n <= 1 || s == expected;
            expected = expected.saturating_mul(n);
            ok
        })
}

fn u16_at(file: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(*file.get(at..)?.first_chunk()?).into())
}

fn u32_at(file: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(*file.get(at..)?.first_chunk()?)).ok()
}

/// The entries of a zip archive, all stored uncompressed: name and where the bytes are (APPNOTE 6.3, sections 4.3.7,
/// 4.3.12, 4.3.16).
fn zip(file: &[u8]) -> Result<BTreeMap<String, Range<usize>>, String> {
    let damaged = || "not a whole zip archive: truncated or damaged".to_string();
    // The end record is 22 bytes long and a comment of at most 65535.
    let from = file.len().saturating_sub(22 + 65535);
    let end = file[from..].windows(4).rposition(|w| w == b"PK\x05\x06").ok_or_else(damaged)? + from;
    if end + 22 > file.len() {
        return Err(damaged());
    }
    let (count, mut at) =
        (u16_at(file, end + 10).ok_or_else(damaged)?, u32_at(file, end + 16).ok_or_else(damaged)?);
    if count == 0xffff || at == 0xffff_ffff {
        return Err("a zip archive above 4 GB is not read".into());
    }
    let mut entries = BTreeMap::new();
    for _ in 0..count {
        let entry = file.get(at..).filter(|e| e.starts_with(b"PK\x01\x02")).ok_or_else(damaged)?;
        let field = |i: usize| u16_at(entry, i).ok_or_else(damaged);
        let (method, name, extra, comment) = (field(10)?, field(28)?, field(30)?, field(32)?);
        let size = u32_at(entry, 24).ok_or_else(damaged)?;
        let local = u32_at(entry, 42).ok_or_else(damaged)?;
        let text = entry.get(46..46 + name).ok_or_else(damaged)?;
        let text = String::from_utf8_lossy(text).into_owned();
        if method != 0 {
            return Err(format!("entry {text:?} is compressed: not what torch.save writes"));
        }
        let header = file.get(local..).filter(|h| h.starts_with(b"PK\x03\x04")).ok_or_else(damaged)?;
        let skip = 30 + u16_at(header, 26).ok_or_else(damaged)? + u16_at(header, 28).ok_or_else(damaged)?;
        let start = local.checked_add(skip).ok_or_else(damaged)?;
        let stop = start.checked_add(size).filter(|e| *e <= file.len()).ok_or_else(damaged)?;
        if entries.insert(text.clone(), start..stop).is_some() {
            return Err(format!("entry {text:?} stands in the archive twice"));
        }
        at += 46 + name + extra + comment;
    }
    Ok(entries)
}

/// What a name may stand for.
#[derive(Clone, Copy, Debug)]
enum Name {
    OrderedDict,
    Tensor,
    Parameter,
    Storage(Dtype),
}

fn name(module: &str, name: &str) -> Result<Name, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Name::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Name::Tensor,
        ("torch._utils", "_rebuild_parameter") => Name::Parameter,
        ("torch", "FloatStorage") => Name::Storage(Dtype::F32),
        ("torch", "HalfStorage") => Name::Storage(Dtype::F16),
        ("torch", "BFloat16Storage") => Name::Storage(Dtype::BF16),
        ("torch", "DoubleStorage") => Name::Storage(Dtype::F64),
        ("torch", "LongStorage") => Name::Storage(Dtype::I64),
        ("torch", "IntStorage") => Name::Storage(Dtype::I32),
        ("torch", "CharStorage") => Name::Storage(Dtype::I8),
        ("torch", "ByteStorage") => Name::Storage(Dtype::U8),
        ("torch", "BoolStorage") => Name::Storage(Dtype::BOOL),
        _ => return Err(format!("it asks for {module}.{name}, which no dict of tensors needs: refused")),
    })
}

#[derive(Clone, Debug)]
struct TensorView {
    dtype: Dtype,
    storage: String,
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

/// A value of the machine. Values name others by number, so that none is deep and none is copied.
#[derive(Debug)]
enum Value {
    Nothing,
    Bool,
    Int(i64),
    Text(String),
    Tuple(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Name(Name),
    Storage(Dtype, String),
    Tensor(TensorView),
}

struct Machine<'a> {
    code: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<usize>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<u32, usize>,
}

type Step<T> = Result<T, String>;

impl Machine<'_> {
    /// Runs to the end; returns the top value.
    fn run(&mut self) -> Step<usize> {
        loop {
            match self.byte()? {
                0x80 => drop(self.byte()?),  // PROTO
                0x95 => drop(self.take(8)?), // FRAME
                b'(' => self.marks.push(self.stack.len()),
                b')' => self.push(Value::Tuple(vec![])),
                b't' => {
                    let items = self.since_mark()?;
                    self.push(Value::Tuple(items));
                }
                n @ 0x85..=0x87 => {
                    // TUPLE1 to TUPLE3
                    let from = self.stack.len().checked_sub(usize::from(n) - 0x84).ok_or("the stack is empty")?;
                    let items = self.stack.split_off(from);
                    self.push(Value::Tuple(items));
                }
                b'}' => self.push(Value::Dict(vec![])),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.extend(&[key, value])?;
                }
                b'u' => {
                    let items = self.since_mark()?;
                    self.extend(&items)?;
                }
                b'N' => self.push(Value::Nothing),
                0x88 | 0x89 => self.push(Value::Bool),
                b'K' => {
                    let n = self.byte()?;
                    self.push(Value::Int(n.into()));
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()));
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()));
                }
                0x8a => self.long()?,
                b'X' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.text(n as usize)?;
                }
                0x8c => {
                    let n = self.byte()?;
                    self.text(n.into())?;
                }
                b'c' => {
                    let (module, of) = (self.line()?, self.line()?);
                    self.push(Value::Name(name(&module, &of)?));
                }
                0x93 => {
                    // STACK_GLOBAL
                    let (of, module) = (self.pop()?, self.pop()?);
                    let found = name(self.as_text(module)?, self.as_text(of)?)?;
                    self.push(Value::Name(found));
                }
                b'q' => {
                    let n = self.byte()?;
                    self.remember(n.into())?;
                }
                b'r' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.remember(n)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let n = self.byte()?;
                    self.recall(n.into())?;
                }
                b'j' => {
                    let n = u32::from_le_bytes(self.array()?);
                    self.recall(n)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                b'b' => drop(self.pop()?), // BUILD: attributes of the dict, such as `_metadata`
                b'.' => return self.pop(),
                other => {
                    return Err(format!("instruction {other:#04x} is none that a dict of tensors needs: refused"));
                }
            }
        }
    }

    fn take(&mut self, n: usize) -> Step<&[u8]> {
        let end = self.at.checked_add(n).filter(|e| *e <= self.code.len()).ok_or("it ends in the middle")?;
        let bytes = &self.code[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        bytes.try_into().map_err(|_| "it ends in the middle".into())
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn line(&mut self) -> Step<String> {
        let rest = &self.code[self.at..];
        let n = rest.iter().position(|b| *b == b'\n').ok_or("it ends in the middle")?;
        let line = String::from_utf8_lossy(&rest[..n]).into_owned();
        self.at += n + 1;
        Ok(line)
    }

    fn text(&mut self, n: usize) -> Step<()> {
        let text = std::str::from_utf8(self.take(n)?).map_err(|_| "a text is not UTF-8")?.to_owned();
        self.push(Value::Text(text));
        Ok(())
    }

    /// LONG1: little-endian two's complement.
    fn long(&mut self) -> Step<()> {
        let n = self.byte()?;
        let bytes = self.take(n.into())?;
        if bytes.len() > 8 {
            return Err("a number of more than 64 bits".into());
        }
        let negative = bytes.last().is_some_and(|b| *b >= 128);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        self.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Step<usize> {
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn since_mark(&mut self) -> Step<Vec<usize>> {
        let mark = self.marks.pop().filter(|m| *m <= self.stack.len()).ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    /// Adds keys and values to the dict on top.
    fn extend(&mut self, items: &[usize]) -> Step<()> {
        let top = *self.stack.last().ok_or("the stack is empty")?;
        let Value::Dict(dict) = &mut self.values[top] else { return Err("items for what is no dict".into()) };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".into());
        }
        dict.extend(pairs.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn remember(&mut self, n: u32) -> Step<()> {
        let top = *self.stack.last().ok_or("the stack is empty")?;
        self.memo.insert(n, top);
        Ok(())
    }

    fn recall(&mut self, n: u32) -> Step<()> {
        let value = *self.memo.get(&n).ok_or_else(|| format!("memo {n} is empty"))?;
        self.stack.push(value);
        Ok(())
    }

    fn as_text(&self, value: usize) -> Step<&str> {
        match &self.values[value] {
            Value::Text(text) => Ok(text),
            other => Err(format!("expected a text, found {}", kind(other))),
        }
    }

    fn as_tuple(&self, value: usize) -> Step<&[usize]> {
        match &self.values[value] {
            Value::Tuple(items) => Ok(items),
            other => Err(format!("expected a tuple, found {}", kind(other))),
        }
    }

    fn as_size(&self, value: usize) -> Step<usize> {
        match &self.values[value] {
            Value::Int(n) => usize::try_from(*n).map_err(|_| format!("a size of {n}")),
            other => Err(format!("expected a number, found {}", kind(other))),
        }
    }

    fn sizes(&self, value: usize) -> Step<Vec<usize>> {
        self.as_tuple(value)?.iter().map(|v| self.as_size(*v)).collect()
    }

    /// BINPERSID: ("storage", type, key, device, number of elements).
    fn storage(&mut self) -> Step<()> {
        let id = self.pop()?;
        let &[tag, of, key, ..] = self.as_tuple(id)? else { return Err("a storage of too few parts".into()) };
        let (Value::Name(Name::Storage(dtype)), "storage") = (&self.values[of], self.as_text(tag)?) else {
            return Err("a persistent id that is no storage".into());
        };
        let value = Value::Storage(*dtype, self.as_text(key)?.to_owned());
        self.push(value);
        Ok(())
    }

    /// REDUCE: the three calls there are.
    fn call(&mut self) -> Step<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.as_tuple(arguments)?;
        let value = match (&self.values[function], arguments) {
            (Value::Name(Name::OrderedDict), _) => Value::Dict(vec![]),
            (Value::Name(Name::Tensor), &[storage, offset, shape, stride, ..]) => {
                let Value::Storage(dtype, key) = &self.values[storage] else {
                    return Err("a tensor without a storage".into());
                };
                let (shape, stride) = (self.sizes(shape)?, self.sizes(stride)?);
                let (offset, storage) = (self.as_size(offset)?, key.clone());
                Value::Tensor(TensorView { dtype: *dtype, storage, offset, shape, stride })
            }
            (Value::Name(Name::Parameter), &[tensor, ..]) => match &self.values[tensor] {
                Value::Tensor(t) => Value::Tensor(t.clone()),
                other => return Err(format!("a parameter of {}", kind(other))),
            },
            (other, _) => return Err(format!("a call of {} with {} arguments", kind(other), arguments.len())),
        };
        self.push(value);
        Ok(())
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Nothing => "None",
        Value::Bool => "a boolean",
        Value::Int(_) => "a number",
        Value::Text(_) => "a text",
        Value::Tuple(_) => "a tuple",
        Value::Dict(_) => "a dict",
        Value::Name(_) => "a name",
        Value::Storage(..) => "a storage",
        Value::Tensor(_) => "a tensor",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive as torch writes it: one folder, nothing compressed.
    fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let (mut file, mut directory) = (vec![], vec![]);
        for (name, bytes) in entries {
            let name = format!("m/{name}");
            let local = file.len() as u32;
            let sizes = [bytes.len() as u32, bytes.len() as u32].map(u32::to_le_bytes).concat();
            let lengths = [name.len() as u16, 0].map(u16::to_le_bytes).concat();
            file.extend([b"PK\x03\x04".as_slice(), &[0; 14], &sizes, &lengths, name.as_bytes(), bytes].concat());
            let head = [b"PK\x01\x02".as_slice(), &[0; 16], &sizes, &lengths, &[0; 10]].concat();
            directory.extend([head, local.to_le_bytes().to_vec(), name.into_bytes()].concat());
        }
        let start = (file.len() as u32).to_le_bytes();
        file.extend(&directory);
        let count = [0, 0, entries.len() as u16, entries.len() as u16].map(u16::to_le_bytes).concat();
        file.extend(
            [b"PK\x05\x06".as_slice(), &count, &(directory.len() as u32).to_le_bytes(), &start, &[0; 2]].concat(),
        );
        file
    }

    fn text(s: &str) -> Vec<u8> {
        [b"X".as_slice(), &(s.len() as u32).to_le_bytes(), s.as_bytes()].concat()
    }

    /// {"w": a [2, 3] tensor at an offset of its storage}
    fn program(shape: [u8; 2], stride: [u8; 2], offset: u8) -> Vec<u8> {
        [
            b"\x80\x02}".to_vec(),
            text("w"),
            b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
            text("storage"),
            b"ctorch\nFloatStorage\n".to_vec(),
            text("0"),
            text("cpu"),
            vec![b'K', 8, b't', b'Q', b'K', offset],
            vec![b'K', shape[0], b'K', shape[1], 0x86, b'K', stride[0], b'K', stride[1], 0x86],
            b"\x89ccollections\nOrderedDict\n)RtRs.".to_vec(),
        ]
        .concat()
    }

    #[test]
    fn a_tensor_is_a_range_of_the_file() {
        let data: Vec<u8> = (0..32).collect();
        let file =
            archive(&[("data.pkl", &program([2, 3], [3, 1], 1)), ("byteorder", b"little"), ("data/0", &data)]);
        let found = tensors(&file).unwrap();
        let [(name, dtype, shape, range)] = &found[..] else { panic!("{found:?}") };
        assert_eq!(
            (name.as_str(), *dtype, &shape[..], &file[range.clone()]),
            ("w", Dtype::F32, &[2, 3][..], &data[4..28])
        );
    }

    #[test]
    fn hostile_files_are_errors() {
        let data = [0u8; 32];
        let with = |pickle: &[u8]| archive(&[("data.pkl", pickle), ("data/0", &data)]);
        let table: [(Vec<u8>, &str); 12] = [
            (with(b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00lstR."), "posix.system"),
            (with(b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93."), "builtins.eval"),
            (with(b"\x80\x02(S'x'\no."), "refused"),
            (with(b"\x80\x02}"), "ends in the middle"),
            (with(b"\x80\x02K\x01."), "no dict"),
            (with(b"\x80\x02}K\x01K\x02s."), "not a bare state dict"),
            (with(b"\x80\x02h\x07."), "memo 7"),
            (with(&program([2, 3], [1, 2], 0)), "not row-major"),
            (with(&program([2, 4], [4, 1], 1)), "storage \"0\" has 32"),
            (archive(&[("data.pkl", &program([2, 3], [3, 1], 0))]), "no storage"),
            (archive(&[("byteorder", b"big"), ("data.pkl", b"")]), "expected little"),
            (archive(&[("x", b"")]), "without data.pkl"),
        ];
        for (file, expected) in table {
            let error = tensors(&file).unwrap_err();
            assert!(error.contains(expected), "{error}, expected {expected}");
        }
        // A billion laughs: 200 tuples, each of the one before twice.
        let laughs = [b")q\x00".to_vec(), b"h\x00h\x00\x86q\x00".repeat(200), b".".to_vec()].concat();
        assert!(tensors(&with(&laughs)).unwrap_err().contains("no dict"));
    }

    #[test]
    fn damage_never_panics() {
        let file =
            archive(&[("data.pkl", &program([2, 3], [3, 1], 1)), ("byteorder", b"little"), ("data/0", &[7; 32])]);
        for cut in 0..file.len() {
            assert!(tensors(&file[..cut]).is_err(), "cut at {cut}");
        }
        let mut rng = crate::rng::Rng::new(3);
        for _ in 0..20_000 {
            let mut bad = file.clone();
            for _ in 0..1 + rng.below(4) {
                let i = rng.below(bad.len());
                bad[i] = rng.below(256) as u8;
            }
            _ = tensors(&bad);
        }
    }
}
