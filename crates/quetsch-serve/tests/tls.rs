//! HTTPS, and TLS in front of gRPC.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Client, Server};
use quetsch_serve::TlsFiles;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// A new certificate of localhost in `cert.pem` and `key.pem`.
fn certificate(at: &Path) -> (TlsFiles, CertificateDer<'static>) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let files = TlsFiles { cert: at.join("cert.pem"), key: at.join("key.pem") };
    std::fs::write(&files.cert, cert.pem()).unwrap();
    std::fs::write(&files.key, signing_key.serialize_pem()).unwrap();
    (files, cert.der().clone())
}

type Stream = StreamOwned<ClientConnection, TcpStream>;

fn connect(to: SocketAddr, trust: &CertificateDer<'static>, alpn: &[u8]) -> std::io::Result<Stream> {
    let mut roots = RootCertStore::empty();
    roots.add(trust.clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    let session = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut stream = StreamOwned::new(session, stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

fn ready(server: &Server, trust: &CertificateDer<'static>) {
    let begin = Instant::now();
    loop {
        let stream = connect(server.address, trust, b"http/1.1").unwrap();
        if Client::over(stream).send("GET", "/health", &[], b"").status == 200 {
            return;
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "not ready");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn https_and_grpc_over_tls() {
    let place = tempfile::tempdir().unwrap();
    let (files, first) = certificate(place.path());
    let mut config = common::config();
    config.tls = Some(files);
    config.grpc_port = Some(0);
    config.limits.header_timeout = Duration::from_millis(300);
    let server = common::start_cold(config).unwrap();
    ready(&server, &first);
    let mut client = Client::over(connect(server.address, &first, b"http/1.1").unwrap());
    let found = client.post("/predict", &json!({ "inputs": "top up" }));
    assert_eq!(found.status, 200, "{}", found.body);
    let grpc = connect(server.grpc.unwrap(), &first, b"h2").unwrap();
    assert_eq!(grpc.conn.alpn_protocol(), Some(&b"h2"[..]));

    // Nobody without TLS gets in, and nobody who is silent stays.
    assert!(server.connect().silent(), "no answer in the clear");

    // A new certificate is taken at the next reload; a broken one is not.
    let (_, second) = certificate(place.path());
    server.reload();
    let begin = Instant::now();
    while connect(server.address, &second, b"http/1.1").is_err() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the old certificate is still there");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::write(place.path().join("cert.pem"), "no certificate").unwrap();
    server.reload();
    std::thread::sleep(Duration::from_millis(200));
    assert!(connect(server.address, &second, b"http/1.1").is_ok());
    server.finish().unwrap();
}

#[test]
fn a_certificate_that_cannot_be_used_is_said_at_once() {
    let place = tempfile::tempdir().unwrap();
    let (files, _) = certificate(place.path());
    let other = tempfile::tempdir().unwrap();
    let (others, _) = certificate(other.path());
    let rows = [
        (TlsFiles { cert: "none.pem".into(), ..files.clone() }, "none.pem"),
        (TlsFiles { cert: files.key.clone(), ..files.clone() }, "there is no certificate in it"),
        (TlsFiles { key: others.key, ..files }, "key.pem"),
    ];
    for (files, want) in rows {
        let mut config = common::config();
        config.tls = Some(files);
        let error = common::start_cold(config).err().unwrap().to_string();
        assert!(error.contains(want), "{error}");
    }
}
