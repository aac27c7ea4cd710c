//! A connection to a sheep: one request, one answer, in turn.
//!
//! Always holds:
//! 1. Connecting fails within [`CONNECT_DEADLINE`]; an answer is awaited for as long as it takes, because the cluster may be
//!    recovering and answers when it has finished.
//! 2. After an error of the connection nothing more is sent on it: commands end then.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use qemu_proto::exchange::exchange;
use qemu_proto::opcode::CLIENT_VERSION_MAX;
use qemu_proto::request::Request;
use qemu_proto::response::Response;
use qemu_proto::status::Status;

use crate::exit::Failure;
use crate::meaning::{NodePort, Target};
use crate::secure::Secure;

/// A machine that is up answers or refuses at once; one that is down would keep the kernel trying for two minutes.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A connection.
pub struct Sheep {
    target: Target,
    stream: Stream,
}

/// The ways to a sheep.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Secure(Box<Secure>),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.read(buffer),
            Stream::Unix(stream) => stream.read(buffer),
            Stream::Secure(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => stream.write(bytes),
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Secure(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Tcp(stream) => stream.flush(),
            Stream::Unix(stream) => stream.flush(),
            Stream::Secure(stream) => stream.flush(),
        }
    }
}

/// What the sheep said instead of doing what it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refusal(pub u32);

impl Refusal {
    /// Whether it is this one.
    pub fn is(self, status: Status) -> bool {
        self.0 == status.code()
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Status::from_code(self.0) {
            Some(status @ Status::NoSupport) => write!(
                f,
                "{}: a node may run an earlier version (the log of the sheep that was asked names it)",
                status.text()
            ),
            Some(status) => f.write_str(status.text()),
            None => write!(f, "Invalid error code {:x}", self.0),
        }
    }
}

/// Why a request was not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// The connection is gone; the failure is complete.
    Lost(Failure),
    /// The sheep answered, and said no.
    Refused(Refusal),
}

impl Trouble {
    /// The failure to end with; `explain` words a refusal.
    pub fn or(self, explain: impl FnOnce(Refusal) -> Failure) -> Failure {
        match self {
            Trouble::Lost(failure) => failure,
            Trouble::Refused(refusal) => explain(refusal),
        }
    }

    /// Whether the sheep refused with this status.
    pub fn is(&self, status: Status) -> bool {
        matches!(self, Trouble::Refused(refusal) if refusal.is(status))
    }
}

impl Sheep {
    /// Connects.
    pub fn connect(target: Target) -> Result<Sheep, Failure> {
        let connected = match target {
            Target::Secure(place) => return Sheep::connect_secure(target, place),
            Target::Tcp(socket) => TcpStream::connect_timeout(&socket, CONNECT_DEADLINE)
                .and_then(|stream| stream.set_nodelay(true).map(|()| Stream::Tcp(stream))),
            Target::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
        };
        match connected {
            Ok(stream) => Ok(Sheep { target, stream }),
            Err(error) => Err(not_connected(target, &error)),
        }
    }

    /// Connects to the first of a node's addresses that works.
    fn connect_secure(target: Target, place: &NodePort) -> Result<Sheep, Failure> {
        let mut failures = Vec::new();
        for &address in &place.addresses {
            match Secure::connect(address, &place.key) {
                Ok(secure) => return Ok(Sheep { target, stream: Stream::Secure(Box::new(secure)) }),
                Err(failure) => failures.push(failure.message),
            }
        }
        Err(Failure::system(failures.join("\n")))
    }

    /// Who is asked.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Sends a request and waits for its answer, whatever that says.
    pub fn ask(&mut self, mut request: Request, payload: &[u8]) -> Result<(Response, Vec<u8>), Trouble> {
        if request.op().is_some_and(qemu_proto::opcode::Opcode::is_public) {
            request.proto_ver = CLIENT_VERSION_MAX;
        }
        exchange(&mut self.stream, &request, payload).map_err(|error| {
            let advice = match self.target {
                Target::Tcp(_) if !self.target.is_local() => {
                    "see the log of that sheep; without --allow-clients it serves clients of its own machine only, and \
                     others with a copy of the cluster key (--key FILE)"
                }
                _ => "see the log of that sheep",
            };
            let text = format!("lost the connection to {} before it answered: {error}; {advice}", self.target);
            Trouble::Lost(Failure::system(text))
        })
    }

    /// Sends a request and waits for it to be done.
    pub fn call(&mut self, request: Request, payload: &[u8]) -> Result<(Response, Vec<u8>), Trouble> {
        let (response, answer) = self.ask(request, payload)?;
        if response.result == Status::Success.code() {
            Ok((response, answer))
        } else {
            Err(Trouble::Refused(Refusal(response.result)))
        }
    }
}

fn not_connected(target: Target, error: &io::Error) -> Failure {
    // The system's text without Rust's "(os error N)", as scripts have it.
    let text = error.to_string();
    let reason = text.split(" (os error").next().unwrap_or_default();
    let advice = match target {
        Target::Tcp(socket) => format!(
            "start a sheep there (sheep DIR -p {}), or name a running one with -a ADDRESS -p PORT",
            socket.port()
        ),
        Target::Unix(_) => "name the file 'sock' in the directory of a sheep that runs".to_owned(),
        Target::Secure(_) => "name the port for other nodes of a sheep that runs: -a ADDRESS:PORT".to_owned(),
    };
    Failure::system(format!("failed to connect to {target}: {reason}; {advice}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use std::net::TcpListener;

    #[test]
    fn a_refused_connection_says_what_to_do() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("its address");
        drop(listener);
        let failure = Sheep::connect(Target::Tcp(address)).err().expect("nobody listens");
        assert_eq!(failure.exit, Exit::System);
        assert!(
            failure.message.starts_with(&format!("failed to connect to {address}: Connection refused;")),
            "{failure}"
        );
        assert!(failure.message.contains("-a ADDRESS"), "{failure}");
    }

    #[test]
    fn unknown_results_keep_their_number() {
        assert_eq!(Refusal(0x16).to_string(), "Waiting for cluster to be formatted");
        assert_eq!(Refusal(0xfe).to_string(), "Invalid error code fe");
    }
}
