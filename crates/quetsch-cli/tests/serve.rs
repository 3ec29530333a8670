//! `quetsch serve` as a process: an answer over loopback, then SIGTERM.
#![allow(missing_docs)]

mod common;

use common::Place;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
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

#[cfg(unix)]
#[test]
fn it_answers_and_ends_on_sigterm() {
    let place = Place::new();
    let mut child = Command::new(env!("CARGO_BIN_EXE_quetsch"))
        .current_dir(place.path(""))
        .args(["serve", "--model", "intents=model", "--port", "0", "-v"])
        .env("QUETSCH_API_KEY", "a secret key")
        .env_remove("RUST_LOG")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("stdout")).read_line(&mut line).expect("a line");
    let address = line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("{line:?}")).to_owned();
    let request = |head: &str, body: &str| {
        let mut stream = TcpStream::connect(&address).expect("a connection");
        let head =
            format!("{head} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer a secret key\r\n");
        let rest = format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        stream.write_all((head + &rest).as_bytes()).expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    };
    let begin = Instant::now();
    while !request("GET /health", "").starts_with("HTTP/1.1 200") {
        assert!(begin.elapsed() < Duration::from_secs(20), "not ready");
        std::thread::sleep(Duration::from_millis(10));
    }
    let answer = request("POST /predict", r#"{"inputs": "i lost my zebra", "top_k": 1}"#);
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let done = place.ok("predict --model model --top-k 1 --format json i_lost_my_zebra");
    assert!(done.stdout.contains("label"), "{}", done.stdout);

    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill");
    assert!(killed.success());
    let output = child.wait_with_output().expect("the end");
    let log = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{log}");
    assert!(log.contains("/predict") && log.contains("stopped"), "{log}");
    assert!(!log.contains("zebra") && !log.contains("secret"), "what users write is not logged: {log}");
}
