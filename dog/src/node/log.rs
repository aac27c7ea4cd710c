//! `dog node log level`

use qemu_proto::flags::RequestFlags;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::stat::LOG_LEVELS;

use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::report::{Form, Report};

/// Bytes of a level on the wire.
const LEVEL_BYTES: usize = 4;

/// Log levels, by name and number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Levels {
    /// That of a node.
    Of(&'static str, usize),
    /// All there are.
    All,
}

/// Runs the command.
pub fn run(typed: &args::Log, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("level") => {}
        other => return Err(Failure::nested(other, "level")),
    }
    let form = Form::of(false, typed.json);
    match (typed.what.as_deref(), typed.level.as_deref()) {
        (Some("get"), _) => Ok(Report::new(form, get(target)?)),
        (Some("list"), _) => Ok(Report::new(form, Levels::All)),
        (Some("set"), Some(level)) => set(target, number(level)?),
        (Some("set"), None) => Err(Failure::usage("Say which level: dog node log level set LEVEL")),
        (other, _) => Err(Failure::nested(other, "get, set or list")),
    }
}

fn number(name: &str) -> Result<usize, Failure> {
    LOG_LEVELS.iter().position(|known| *known == name).ok_or_else(|| {
        let text = format!("invalid loglevel: {name}\navailable loglevels: {}", LOG_LEVELS.join(" "));
        Failure::new(Exit::Usage, text)
    })
}

fn get(target: Target) -> Result<Levels, Failure> {
    let mut request = Request::plain(Opcode::GetLoglevel);
    request.data_length = LEVEL_BYTES as u32;
    let (_, answer) = Sheep::connect(target)?
        .call(request, &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Failed to get the log level: {reason}"))))?;
    let number = answer.first_chunk().map(|bytes| u32::from_le_bytes(*bytes) as usize);
    let level = number.and_then(|number| LOG_LEVELS.get(number).map(|name| Levels::Of(name, number)));
    level.ok_or_else(|| Failure::system(format!("{target} answered with a log level that there is not")))
}

fn set(target: Target, number: usize) -> Result<Report, Failure> {
    let mut request = Request::plain(Opcode::SetLoglevel);
    request.flags = RequestFlags::WRITE;
    request.data_length = LEVEL_BYTES as u32;
    Sheep::connect(target)?
        .call(request, &(number as u32).to_le_bytes())
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Failed to set the log level: {reason}"))))?;
    Ok(Report::silent())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;

    fn log(nested: &str, what: Option<&str>, level: Option<&str>) -> args::Log {
        let owned = |word: Option<&str>| word.map(str::to_owned);
        args::Log { nested: owned(Some(nested)), what: owned(what), level: owned(level), json: false }
    }

    #[test]
    fn a_level_is_set_by_name() {
        let fake = FakeSheep::start(1);
        run(&log("level", Some("set"), Some("debug")), fake.target).expect("set");
        assert_eq!(fake.kept().log_level, 7);
        assert_eq!(get(fake.target), Ok(Levels::Of("debug", 7)));
        fake.kept().log_level = 99;
        assert_eq!(get(fake.target).expect_err("no level").exit, Exit::System);
    }

    #[test]
    fn wrong_words_are_told_apart() {
        let fake = FakeSheep::start(1);
        let exit = |typed: args::Log| run(&typed, fake.target).err().expect("refused").exit;
        assert_eq!(exit(log("levels", None, None)), Exit::Failure);
        assert_eq!(exit(log("level", None, None)), Exit::Usage);
        assert_eq!(exit(log("level", Some("show"), None)), Exit::Failure);
        assert_eq!(exit(log("level", Some("set"), None)), Exit::Usage);
        assert_eq!(exit(log("level", Some("set"), Some("loud"))), Exit::Usage);
        assert!(fake.kept().counts.is_empty(), "nobody was asked");
    }
}
