//! Tensors as they travel: JSON, flat or nested, or bytes in row-major order, where numbers are little-endian and each
//! string stands behind its length in four bytes.

use crate::refusal::Refusal;
use serde_json::Value;

/// A tensor of a request.
pub struct Tensor {
    pub name: String,
    pub datatype: String,
    pub shape: Vec<usize>,
    pub data: Data,
}

/// Its values, flat.
#[derive(Debug, PartialEq)]
pub enum Data {
    Texts(Vec<String>),
    Integers(Vec<i64>),
}

/// The values of an answer, flat.
pub enum Values {
    Texts(Vec<String>),
    Floats(Vec<f32>),
}

impl Tensor {
    /// Why this tensor cannot be taken.
    pub fn refuse(&self, what: &str) -> Refusal {
        Refusal::Shape(format!("input `{}`: {what}", self.name))
    }

    /// There are exactly as many values as the shape says.
    pub fn check_count(&self) -> Result<(), Refusal> {
        let found = match &self.data {
            Data::Texts(values) => values.len(),
            Data::Integers(values) => values.len(),
        };
        match self.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)) == Some(found) {
            true => Ok(()),
            false => Err(self.refuse(&format!("shape {:?} does not hold the {found} values of data", self.shape))),
        }
    }
}

impl Data {
    /// From JSON, flat or nested.
    pub fn from_json(value: &Value) -> Result<Data, Refusal> {
        fn collect<'a>(value: &'a Value, into: &mut Vec<&'a Value>) {
            match value {
                Value::Array(list) => list.iter().for_each(|v| collect(v, into)),
                value => into.push(value),
            }
        }
        if !value.is_array() {
            return Err(Refusal::Shape("data: expected a list".into()));
        }
        let mut values = vec![];
        collect(value, &mut values);
        match values.first() {
            Some(Value::String(_)) => {
                let texts = values.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<_>>();
                texts.map(Data::Texts).ok_or_else(|| Refusal::Shape("data: expected strings only".into()))
            }
            _ => {
                let integers = values.iter().map(|v| v.as_i64()).collect::<Option<_>>();
                integers.map(Data::Integers).ok_or_else(|| Refusal::Shape("data: expected integers only".into()))
            }
        }
    }

    /// From bytes.
    pub fn from_bytes(datatype: &str, bytes: &[u8]) -> Result<Data, Refusal> {
        let uneven = || Refusal::Shape(format!("{} bytes are no whole number of {datatype}", bytes.len()));
        match datatype {
            "BYTES" => strings(bytes).map(Data::Texts),
            "INT64" => {
                let (values, []) = bytes.as_chunks() else { return Err(uneven()) };
                Ok(Data::Integers(values.iter().map(|v| i64::from_le_bytes(*v)).collect()))
            }
            "INT32" => {
                let (values, []) = bytes.as_chunks() else { return Err(uneven()) };
                Ok(Data::Integers(values.iter().map(|v| i32::from_le_bytes(*v).into()).collect()))
            }
            other => Err(Refusal::Shape(format!("datatype {other}: expected BYTES, INT64 or INT32"))),
        }
    }
}

fn strings(mut bytes: &[u8]) -> Result<Vec<String>, Refusal> {
    let mut texts = vec![];
    while !bytes.is_empty() {
        let broken = || Refusal::Shape(format!("the bytes end within string {}", texts.len()));
        let (length, rest) = bytes.split_first_chunk().ok_or_else(broken)?;
        let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(broken)?;
        texts.push(utf8(text.to_vec())?);
        bytes = rest;
    }
    Ok(texts)
}

/// A text from a client's bytes.
pub fn utf8(bytes: Vec<u8>) -> Result<String, Refusal> {
    String::from_utf8(bytes).map_err(|_| Refusal::Shape("a text is not UTF-8".into()))
}

impl Values {
    /// As bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        match self {
            Values::Floats(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::Texts(texts) => {
                let length = |t: &String| (t.len() as u32).to_le_bytes(); // labels of a model
                texts.iter().flat_map(|t| length(t).into_iter().chain(t.bytes())).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_values_and_back() {
        let texts = vec!["".to_owned(), "Stra\u{df}e".into(), "我".into()];
        let bytes = Values::Texts(texts.clone()).to_bytes();
        assert_eq!(bytes[..8], [0, 0, 0, 0, 7, 0, 0, 0]);
        assert_eq!(Data::from_bytes("BYTES", &bytes), Ok(Data::Texts(texts)));
        assert_eq!(Values::Floats(vec![1.0, -2.0]).to_bytes(), [0, 0, 128, 63, 0, 0, 0, 192]);
        let integers = [[7; 8], [255; 8]].concat();
        assert_eq!(Data::from_bytes("INT64", &integers), Ok(Data::Integers(vec![0x0707_0707_0707_0707, -1])));
        assert_eq!(Data::from_bytes("INT32", &[255; 4]), Ok(Data::Integers(vec![-1])));
    }

    #[test]
    fn broken_bytes_are_refused() {
        let rows: [(&str, &[u8], &str); 6] = [
            ("BYTES", &[1, 0, 0], "end within string 0"),
            ("BYTES", &[0, 0, 0, 0, 2, 0, 0, 0, 65], "end within string 1"),
            ("BYTES", &[255, 255, 255, 255, 65], "end within string 0"),
            ("BYTES", &[1, 0, 0, 0, 255], "not UTF-8"),
            ("INT64", &[0; 9], "no whole number"),
            ("FP32", &[0; 4], "datatype FP32"),
        ];
        for (datatype, bytes, want) in rows {
            let error = Data::from_bytes(datatype, bytes).unwrap_err().to_string();
            assert!(error.contains(want), "{datatype} {bytes:?}: {error}");
        }
    }
}
