//! What a storage of a test leaves to the one below it.

/// Functions of `Storage` that do what those of a field do: `pass_on!(disk: read size)`. Others call a function
/// afterwards: `pass_on!(disk: write flush, then look)`.
macro_rules! pass_on {
    ($below:ident: $($name:ident)+) => {
        $(pass_on!(@$name $below);)+
    };
    ($below:ident: $($name:ident)+, then $after:ident) => {
        $(pass_on!(@$name $below, $after);)+
    };
    (@read $below:ident) => {
        fn read(&self, pieces: &[qcow2::storage::IoDst<'_>], offset: u64) -> std::io::Result<usize> {
            self.$below.read(pieces, offset)
        }
    };
    (@write $below:ident $(, $after:ident)?) => {
        fn write(&self, pieces: &[qcow2::storage::IoSrc<'_>], offset: u64) -> std::io::Result<()> {
            let result = self.$below.write(pieces, offset);
            $(self.$after();)?
            result
        }
    };
    (@flush $below:ident $(, $after:ident)?) => {
        fn flush(&self) -> std::io::Result<()> {
            let result = self.$below.flush();
            $(self.$after();)?
            result
        }
    };
    (@size $below:ident) => {
        fn size(&self) -> std::io::Result<u64> {
            self.$below.size()
        }
    };
    (@truncate $below:ident $(, $after:ident)?) => {
        fn truncate(&self, size: u64) -> std::io::Result<()> {
            let result = self.$below.truncate(size);
            $(self.$after();)?
            result
        }
    };
}

pub(crate) use pass_on;
