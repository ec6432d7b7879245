// Registers the translation of emoe::Error into the classes of emoe.errors.
#pragma once

namespace emoe {
void register_errors();
}
