//! `quetsch serve` as a process: an answer over loopback, then SIGTERM.
#![allow(missing_docs)]

mod common;

use common::Place;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn bad_flags_are_usage_errors_and_bad_models_failures() {
    let place = Place::new();
    let rows = [
        ("serve", 2, "--model"),
        ("serve --model model --port x", 2, "--port"),
        ("serve --model model --host nowhere", 2, "--host"),
        ("serve --model model --tls-cert cert.pem", 2, "--tls-key"),
        (
            "serve --model model --port 0 --tls-cert train.csv --tls-key train.csv",
            1,
            "train.csv: there is no certificate",
        ),
        ("serve --model model --cors-allow-origin *", 2, "https://example.com"),
        ("serve --model model --reload-interval 0", 2, "--reload-interval"),
        ("serve --model none --port 0", 1, "none"),
        ("serve --model a=model --model a=model --port 0", 1, "two models are called `a`"),
        ("serve --model model --port 0 --max-client-batch-size 600", 1, "max_client_batch_size"),
    ];
    for (line, code, want) in rows {
        let done = place.run(line);
        assert_eq!(done.code, code, "{line}\n{}", done.stderr);
        assert!(done.stderr.contains(want), "{line}\n{}", done.stderr);
    }
}

/// A running `quetsch serve`.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(place: &Place, more: &[&str]) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_quetsch"))
            .current_dir(place.path(""))
            .args(["serve", "--model", "intents=model", "--port", "0", "-v"])
            .args(more)
            .env("QUETSCH_API_KEY", "a secret key")
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
        let address =
            line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("{line:?}")).to_owned();
        let server = Server { child, address };
        let begin = Instant::now();
        while !server.request("GET /health", "").starts_with("HTTP/1.1 200") {
            assert!(begin.elapsed() < Duration::from_secs(20), "not ready");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }

    fn request(&self, head: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        let head =
            format!("{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer a secret key\r\n");
        let rest = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all((head + &rest).as_bytes()).expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    /// SIGTERM; its log.
    fn stop(self) -> String {
        let killed = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().expect("kill");
        assert!(killed.success());
        let output = self.child.wait_with_output().expect("the end");
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{log}");
        log
    }
}

#[cfg(unix)]
#[test]
fn it_answers_and_ends_on_sigterm() {
    let place = Place::new();
    let server = Server::start(&place, &[]);
    let answer = server.request("POST /predict", r#"{"inputs": "i lost my zebra", "top_k": 1}"#);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let done = place.ok("predict --model model --top-k 1 --format json i_lost_my_zebra");
    assert!(done.stdout.contains("label"), "{}", done.stdout);
    let log = server.stop();
    assert!(log.contains("/predict") && log.contains("stopped"), "{log}");
    assert!(!log.contains("zebra") && !log.contains("secret"), "what users write is not logged: {log}");
}

/// What an OpenTelemetry collector is sent: spans of requests as protobuf, no text of a user, all of it by the end.
#[cfg(all(unix, feature = "otlp"))]
#[test]
fn spans_reach_a_collector() {
    let place = Place::new();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("http://{}/v1/traces", listener.local_addr().expect("an address"));
    let collector = std::thread::spawn(move || {
        let mut all = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
            loop {
                let (mut head, mut length) = (String::new(), 0);
                while reader.read_line(&mut head).is_ok_and(|n| n > 2) {
                    let last = head.lines().last().unwrap_or_default().to_ascii_lowercase();
                    length = last
                        .strip_prefix("content-length:")
                        .map_or(length, |v| v.trim().parse().expect("a number"));
                }
                if head.starts_with("GET /end") {
                    return all;
                }
                if head.is_empty() {
                    break; // the client has closed
                }
                assert!(head.starts_with("POST /v1/traces") && head.contains("application/x-protobuf"), "{head}");
                let mut body = vec![0; length];
                reader.read_exact(&mut body).expect("a body");
                all.extend(body);
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").expect("an answer");
            }
        }
    });
    let server = Server::start(&place, &["--otlp-endpoint", &endpoint]);
    let answer = server.request("POST /predict", r#"{"inputs": "i lost my zebra", "top_k": 1}"#);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    server.stop();
    let address = endpoint.trim_start_matches("http://").trim_end_matches("/v1/traces");
    TcpStream::connect(address).and_then(|mut s| s.write_all(b"GET /end HTTP/1.1\r\n\r\n")).expect("the end");
    let sent = String::from_utf8_lossy(&collector.join().expect("the collector")).into_owned();
    for part in ["service.name", "quetsch", "/predict"] {
        assert!(sent.contains(part), "{part}: {sent}");
    }
    assert!(!sent.contains("zebra") && !sent.contains("secret"), "what users write is not sent: {sent}");
}
