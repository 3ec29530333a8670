//! TLS by rustls: a certificate chain and its key from PEM files.

use quetsch::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Where certificate and key are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// The present certificate of one listener.
pub struct Tls {
    files: TlsFiles,
    protocol: &'static [u8],
    acceptor: RwLock<TlsAcceptor>,
}

impl Tls {
    /// Reads the files; `protocol` is what clients are told by ALPN.
    ///
    /// # Errors
    /// A file that cannot be read, or a key that is not the certificate's.
    pub fn read(files: &TlsFiles, protocol: &'static [u8]) -> Result<Tls> {
        let acceptor = RwLock::new(acceptor(files, protocol)?);
        Ok(Tls { files: files.clone(), protocol, acceptor })
    }

    /// For one more connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.acceptor.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the files again; if that fails the old certificate stays.
    pub fn reload(&self) {
        match acceptor(&self.files, self.protocol) {
            Ok(new) => *self.acceptor.write().unwrap_or_else(PoisonError::into_inner) = new,
            Err(e) => tracing::error!("certificate not reloaded, the old one serves on: {e}"),
        }
    }
}

fn acceptor(files: &TlsFiles, protocol: &[u8]) -> Result<TlsAcceptor> {
    let bad = |path: &Path, e: &dyn std::fmt::Display| Error::file(path, format!("{e}; expected a PEM file"));
    let chain = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
        .map_err(|e| bad(&files.cert, &e))?;
    if chain.is_empty() {
        return Err(bad(&files.cert, &"there is no certificate in it"));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| bad(&files.key, &e))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|b| b.with_no_client_auth().with_single_cert(chain, key))
        .map_err(|e| Error::file(&files.cert, format!("with {}: {e}", files.key.display())))?;
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
