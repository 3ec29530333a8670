//! A listening socket and its connections: how many there are, how slow they may be, and how they end.

use crate::Limits;
use crate::tls::Tls;
use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use hyper_util::service::TowerToHyperService;
use quetsch::{Error, Result};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio_io_timeout::TimeoutStream;

/// What is spoken behind a door.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    Http,
    /// HTTP/2, for gRPC.
    Grpc,
}

impl Speaks {
    /// Its name in ALPN.
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Speaks::Http => b"http/1.1",
            Speaks::Grpc => b"h2",
        }
    }
}

/// How far a server is on its way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It serves.
    Open,
    /// It was told to stop. What clients had sent by then is on its way through sockets and is still taken; every HTTP
    /// answer says `Connection: close`.
    LastCall,
    /// Nothing more is taken.
    Closed,
}

/// A listening socket.
pub struct Door {
    listener: TcpListener,
    pub address: SocketAddr,
    pub speaks: Speaks,
    pub tls: Option<Arc<Tls>>,
    pub limits: Limits,
    connections: Arc<Semaphore>,
}

impl Door {
    /// Listens on an address.
    ///
    /// # Errors
    /// It is taken, or not this machine's.
    pub async fn open(at: SocketAddr, speaks: Speaks, tls: Option<Arc<Tls>>, limits: Limits) -> Result<Door> {
        let flag = if speaks == Speaks::Http { "--port" } else { "--grpc-port" };
        let bound = |e| Error::invalid(format!("cannot listen on {at}: {e}; choose another with {flag}"));
        let listener = TcpListener::bind(at).await.map_err(bound)?;
        let address = listener.local_addr().map_err(bound)?;
        let connections = Arc::new(Semaphore::new(limits.max_connections));
        Ok(Door { listener, address, speaks, tls, limits, connections })
    }

    /// Counts the connections that are open, also when the door is closed.
    pub fn counter(&self) -> impl Fn() -> usize + use<> {
        let (connections, all) = (self.connections.clone(), self.limits.max_connections);
        move || all - connections.available_permits()
    }

    /// Takes connections until the server is closed; each of them then ends with the request it is at. They hold `stage`
    /// until then.
    pub async fn admit(self, router: Router, mut stage: watch::Receiver<Stage>) {
        loop {
            let accept = async {
                let permit = self.connections.clone().acquire_owned().await;
                (self.listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                biased;
                accepted = accept => accepted,
                _ = stage.wait_for(|s| *s == Stage::Closed) => return,
            };
            let Ok((stream, _)) = accepted else {
                // Out of file descriptors, say: others will end soon.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let connection = Connection {
                speaks: self.speaks,
                tls: self.tls.clone(),
                limits: self.limits,
                router: router.clone(),
                stage: stage.clone(),
            };
            tokio::spawn(async move {
                connection.run(stream).await;
                drop(permit);
            });
        }
    }
}

/// A connection's terms.
struct Connection {
    speaks: Speaks,
    tls: Option<Arc<Tls>>,
    limits: Limits,
    router: Router,
    stage: watch::Receiver<Stage>,
}

impl Connection {
    /// Its life. A client that breaks off or is too slow is no news.
    async fn run(self, stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(self.limits.body_timeout));
        if self.speaks == Speaks::Grpc {
            // A living client answers pings, so that only a dead or silent one lets this time pass.
            stream.set_read_timeout(Some(self.limits.header_timeout));
        }
        let stream = Box::pin(stream);
        match &self.tls {
            None => self.speak(stream).await,
            Some(tls) => {
                let handshake = tls.acceptor().accept(stream);
                if let Ok(Ok(stream)) = tokio::time::timeout(self.limits.header_timeout, handshake).await {
                    self.speak(stream).await;
                }
            }
        }
    }

    async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let (stream, service) = (TokioIo::new(stream), TowerToHyperService::new(self.router));
        match self.speaks {
            Speaks::Http => {
                let mut builder = http1::Builder::new();
                builder.timer(TokioTimer::new()).header_read_timeout(self.limits.header_timeout);
                until(Stage::Closed, self.stage, builder.serve_connection(stream, service)).await;
            }
            Speaks::Grpc => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder
                    .timer(TokioTimer::new())
                    .keep_alive_interval(self.limits.header_timeout / 3)
                    .keep_alive_timeout(self.limits.header_timeout / 3)
                    .max_concurrent_streams(self.limits.max_concurrent_requests as u32);
                // HTTP/2 tells the client which of its requests are still taken.
                until(Stage::LastCall, self.stage, builder.serve_connection(stream, service)).await;
            }
        }
    }
}

/// Goes on until the client ends it, or, from a stage on, until what has come in is answered.
async fn until(last: Stage, mut stage: watch::Receiver<Stage>, connection: impl GracefulConnection) {
    let mut connection = pin!(connection);
    tokio::select! {
        biased; // bytes that are there are read first
        _ = connection.as_mut() => return,
        _ = stage.wait_for(|s| *s >= last) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}
