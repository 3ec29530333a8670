//! A real server on loopback with the tiny student, and a client that speaks just enough HTTP.
#![allow(dead_code)] // every test file uses its own part
#![allow(missing_docs)]

use quetsch_serve::{Config, Limits, Listening, ModelSource, serve};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// A server; stops when dropped.
pub struct Server {
    pub address: SocketAddr,
    pub grpc: Option<SocketAddr>,
    reload: Arc<Notify>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<quetsch::Result<()>>>,
}

/// `tiny` and `bert` on two workers, on any free port.
pub fn config() -> Config {
    let source = |name: &str, dir: &str| ModelSource { name: name.into(), path: fixture(dir) };
    let mut config = Config::new(vec![source("tiny", "tiny_student"), source("bert", "tiny_bert")]);
    config.port = 0;
    config.threads = 2;
    config.limits = Limits { drain_timeout: Duration::from_secs(5), ..Limits::default() };
    config
}

/// A server with that, ready.
pub fn start(change: impl FnOnce(&mut Config)) -> Server {
    let mut config = config();
    change(&mut config);
    let server = start_cold(config).expect("an address");
    let begin = Instant::now();
    while server.get("/health").status != 200 {
        assert!(begin.elapsed() < Duration::from_secs(20), "not ready");
        std::thread::sleep(Duration::from_millis(5));
    }
    server
}

/// A server that listens, its models perhaps not loaded yet; or why it does not.
pub fn start_cold(config: Config) -> quetsch::Result<Server> {
    let (stop, stopped) = oneshot::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    let reload = Arc::new(Notify::new());
    let reloads = reload.clone();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listening = move |at| tell.send(at).expect("the test waits");
        runtime.block_on(serve(config, listening, async { drop(stopped.await) }, reloads))
    });
    match told.recv() {
        Ok(Listening { http, grpc }) => {
            Ok(Server { address: http, grpc, reload, stop: Some(stop), thread: Some(thread) })
        }
        Err(_) => Err(thread.join().expect("no panic").expect_err("it ended without listening")),
    }
}

impl Server {
    /// Asks it to stop.
    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// As SIGHUP does.
    pub fn reload(&self) {
        self.reload.notify_one();
    }

    /// Stops and waits for the end.
    pub fn finish(mut self) -> quetsch::Result<()> {
        self.stop();
        self.thread.take().expect("running").join().expect("no panic")
    }

    /// The end, without asking for it.
    pub fn outcome(mut self) -> quetsch::Result<()> {
        self.thread.take().expect("running").join().expect("no panic")
    }

    pub fn connect(&self) -> Client {
        Client::new(TcpStream::connect(self.address).expect("a connection"))
    }

    pub fn get(&self, path: &str) -> Response {
        self.connect().send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, body: &Value) -> Response {
        self.connect().post(path, body)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
    pub bytes: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// What HTTP can be spoken over.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// One connection, kept alive.
pub struct Client(BufReader<Box<dyn Stream>>);

pub const JSON: (&str, &str) = ("Content-Type", "application/json");

impl Client {
    pub fn new(stream: TcpStream) -> Client {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream.set_nodelay(true).expect("no delay");
        Client::over(stream)
    }

    pub fn over(stream: impl Stream + 'static) -> Client {
        Client(BufReader::new(Box::new(stream)))
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).expect("written");
    }

    /// Whether a request gets no answer, only an end.
    pub fn silent(mut self) -> bool {
        self.head("GET", "/health", &[], 0);
        self.read().is_none()
    }

    /// Whether everything went out.
    pub fn try_write(&mut self, bytes: &[u8]) -> bool {
        self.0.get_mut().write_all(bytes).is_ok()
    }

    pub fn head(&mut self, method: &str, path: &str, headers: &[(&str, &str)], length: usize) {
        let headers: String = headers.iter().map(|(n, v)| format!("{n}: {v}\r\n")).collect();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: test\r\n{headers}Content-Length: {length}\r\n\r\n");
        self.write(head.as_bytes());
    }

    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        self.head(method, path, headers, body.len());
        // A server may answer and close before it has read everything.
        let _ = self.0.get_mut().write_all(body);
        self.read().expect("an answer")
    }

    pub fn post(&mut self, path: &str, body: &Value) -> Response {
        self.send("POST", path, &[JSON], body.to_string().as_bytes())
    }

    /// The next response; `None` when the connection ended before one.
    pub fn read(&mut self) -> Option<Response> {
        let mut line = String::new();
        self.0.read_line(&mut line).ok()?;
        let status = line.split(' ').nth(1)?.parse().ok()?;
        let mut headers = vec![];
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line).ok()?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) => headers.push((name.to_ascii_lowercase(), value.to_owned())),
                None => break,
            }
        }
        let mut response = Response { status, headers, body: String::new(), bytes: vec![] };
        let length: usize = response.header("content-length").map_or(0, |l| l.parse().expect("a length"));
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).ok()?;
        response.body = String::from_utf8_lossy(&body).into_owned();
        response.bytes = body;
        Some(response)
    }
}
