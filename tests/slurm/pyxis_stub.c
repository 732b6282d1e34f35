/* A plugin of Slurm that takes pyxis's options, shows them to the tasks as STUB_... variables, and starts
 * no container: scripts for pyxis run where there is none. */
#include <slurm/spank.h>
#include <stdio.h>
#include <string.h>

SPANK_PLUGIN(pyxis_stub, 1);

#define OPTIONS 8
static char values[OPTIONS][4096];

static int note(int number, const char *value, int remote)
{
    (void)remote;
    snprintf(values[number], sizeof values[number], "%s", value ? value : "1");
    return 0;
}

static struct spank_option options[OPTIONS] = {
    {"container-image", "IMAGE", "stub", 1, 0, note},
    {"container-mounts", "MOUNTS", "stub", 1, 1, note},
    {"container-workdir", "PATH", "stub", 1, 2, note},
    {"container-name", "NAME", "stub", 1, 3, note},
    {"container-mount-home", NULL, "stub", 0, 4, note},
    {"no-container-mount-home", NULL, "stub", 0, 5, note},
    {"container-env", "NAMES", "stub", 1, 6, note},
    {"container-writable", NULL, "stub", 0, 7, note},
};

int slurm_spank_init(spank_t spank, int count, char **arguments)
{
    (void)count;
    (void)arguments;
    for (int i = 0; i < OPTIONS; i++)
        spank_option_register(spank, &options[i]);
    return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments)
{
    char name[64];
    (void)count;
    (void)arguments;
    for (int i = 0; i < OPTIONS; i++) {
        if (!values[i][0])
            continue;
        snprintf(name, sizeof name, "STUB_%s", options[i].name);
        for (char *letter = name; *letter; letter++)
            if (*letter == '-')
                *letter = '_';
        spank_setenv(spank, name, values[i], 1);
    }
    return 0;
}
