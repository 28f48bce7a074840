/* How AMX's eight tiles are shaped. */
#ifndef SPECDEC_AMX_H
#define SPECDEC_AMX_H

#include <immintrin.h>
#include <stdint.h>

/* Tiles of 64 bytes a row: 6 and 7 have sixteen rows, of the others the even ones `high` and the odd ones `low`. */
static inline void configure(long high, long low) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = (uint8_t)(i > 5 ? 16 : i % 2 ? low : high);
    }
    _tile_loadconfig(&config);
}

#endif
