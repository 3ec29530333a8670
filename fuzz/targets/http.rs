//! Bodies of requests to a server on loopback, in its three protocols; no answer may be its own fault (5xx). The first
//! byte of an input is the route; a second one that is not 0 says that so many bytes of the rest are the JSON part of a
//! body with binary tensors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quetsch_serve::{Config, ModelSource, serve};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use tokio::sync::Notify;

const PATHS: [&str; 6] =
    ["/predict", "/", "/invocations", "/classify", "/v2/models/tiny/infer", "/v2/models/bert/versions/1/infer"];

static ADDRESS: LazyLock<SocketAddr> = LazyLock::new(|| {
    let fixtures = quetsch_fuzz::root().join("fixtures");
    let source = |name: &str, dir: &str| ModelSource { name: name.into(), path: fixtures.join(dir) };
    let mut config = Config::new(vec![source("tiny", "tiny_student"), source("bert", "tiny_bert")]);
    (config.port, config.threads) = (0, 1);
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let listening = move |at: quetsch_serve::Listening| tell.send(at.http).expect("somebody waits");
        let forever = std::future::pending();
        runtime
            .expect("a runtime")
            .block_on(serve(config, listening, forever, Arc::new(Notify::new())))
            .expect("no end");
    });
    let address = told.recv().expect("an address");
    while send(&mut connect(address), address, "GET", "/health", "", b"").0 != 200 {
        std::thread::sleep(std::time::Duration::from_millis(10));
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
        let path = PATHS[*route as usize % PATHS.len()];
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
        for route in 0..PATHS.len() as u8 {
            if body.contains(if route < 3 {
                "inputs"
            } else if route == 3 {
                "\"input\""
            } else {
                "datatype"
            }) {
                seeds.push([&[route, 0], body.as_bytes()].concat());
            }
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
