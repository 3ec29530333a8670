//! Bodies of requests to a server on loopback, in its three protocols; no answer may be its own fault (5xx). The first
//! byte of an input is the route; a second one that is not 0 says that so many bytes of the rest are the JSON part of a
//! body with binary tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch_fuzz::server;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

/// Every route that reads a body, with the word by which a seed for it is known.
const ROUTES: [(&str, &str); 8] = [
    ("/predict", "inputs"),
    ("/", "inputs"),
    ("/invocations", "inputs"),
    ("/classify", "\"input\""),
    ("/v2/models/tiny/infer", "datatype"),
    ("/v2/models/bert/versions/1/infer", "datatype"),
    ("/v1/classify", "\"input\""),
    ("/v2/models/bert/infer", "datatype"),
];

static ADDRESS: LazyLock<SocketAddr> = LazyLock::new(|| {
    let address = server().http;
    while send(&mut connect(address), address, "GET", "/health", "", b"").0 != 200 {
        std::thread::sleep(Duration::from_millis(10));
    }
    address
});
static CLIENT: LazyLock<Mutex<BufReader<TcpStream>>> = LazyLock::new(|| Mutex::new(connect(*ADDRESS)));

fn connect(address: SocketAddr) -> BufReader<TcpStream> {
    let stream = TcpStream::connect(address).expect("a connection");
    stream.set_nodelay(true).expect("no delay");
    BufReader::new(stream)
}

/// Status and body. The server ends a connection whose body it did not want to read: then there is a new one.
fn send(
    client: &mut BufReader<TcpStream>,
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> (u16, Vec<u8>) {
    let n = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: {n}\r\n\r\n");
    client.get_mut().write_all(&[head.as_bytes(), body].concat()).expect("it listens");
    let (mut status, mut length, mut close) = (0, 0, false);
    for first in [true].into_iter().chain(std::iter::repeat(false)) {
        let mut line = String::new();
        client.read_line(&mut line).expect("an answer");
        let line = line.trim_end().to_ascii_lowercase();
        if first {
            status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("{line:?}"));
        } else if let Some(n) = line.strip_prefix("content-length: ") {
            length = n.parse().expect("a number");
        } else if line == "connection: close" {
            close = true;
        } else if line.is_empty() {
            break;
        }
    }
    let mut answer = vec![0; length];
    client.read_exact(&mut answer).expect("the whole answer");
    if close {
        *client = connect(address);
    }
    (status, answer)
}

fuzz_target!(
    init: quetsch_fuzz::seeds(seeds),
    |data: &[u8]| {
        let [route, json, body @ ..] = data else { return };
        let headers = match json {
            0 => "Content-Type: application/json\r\n".to_owned(),
            // 0 to 255 are lengths that fit a seed.
            n => format!("Inference-Header-Content-Length: {}\r\nContent-Type: application/json\r\n", n - 1),
        };
        let path = ROUTES[*route as usize % ROUTES.len()].0;
        let mut client = CLIENT.lock().expect("one thread");
        let (status, answer) = send(&mut client, *ADDRESS, "POST", path, &headers, body);
        assert!(status < 500, "{path} {status}: {}", String::from_utf8_lossy(&answer));
        let binary = status == 200 && path.starts_with("/v2");
        assert!(binary || serde_json::from_slice::<Value>(&answer).is_ok(), "{}", String::from_utf8_lossy(&answer));
    }
);

/// The requests that clients send (fixtures/requests.json), and tensors in bytes.
fn seeds() -> Vec<Vec<u8>> {
    let text = fs::read(quetsch_fuzz::root().join("fixtures/requests.json")).expect("the fixture");
    let requests: Value = serde_json::from_slice(&text).expect("JSON");
    let mut seeds = vec![];
    let mut bodies = vec![];
    collect(&requests, &mut bodies);
    for body in bodies {
        for (route, _) in ROUTES.iter().enumerate().filter(|(_, (_, word))| body.contains(word)) {
            seeds.push([&[route as u8, 0], body.as_bytes()].concat());
        }
    }
    let binary = |json: &str, bytes: &[u8]| [&[4, json.len() as u8 + 1], json.as_bytes(), bytes].concat();
    seeds.push(binary(
        r#"{"inputs":[{"name":"text","shape":[1],"datatype":"BYTES","parameters":{"binary_data_size":9}}],"outputs":[{"name":"logits","parameters":{"binary_data":true}}]}"#,
        b"\x05\0\0\0hello",
    ));
    seeds.push(binary(
        r#"{"inputs":[{"name":"input_ids","shape":[1,2],"datatype":"INT64","parameters":{"binary_data_size":16}}]}"#,
        &[2, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0],
    ));
    seeds
}

/// Bodies of requests: objects and texts of objects that look like one.
fn collect(value: &Value, into: &mut Vec<String>) {
    let known = |text: &str| ["inputs", "\"input\""].iter().any(|k| text.contains(k)) && text.len() < 4000;
    match value {
        Value::String(text) if text.starts_with('{') && known(text) => into.push(text.clone()),
        Value::Object(map) => {
            if map.contains_key("inputs") || map.contains_key("input") {
                let text = value.to_string();
                if known(&text) {
                    into.push(text);
                }
            }
            map.values().for_each(|v| collect(v, into));
        }
        Value::Array(list) => list.iter().for_each(|v| collect(v, into)),
        _ => {}
    }
}
