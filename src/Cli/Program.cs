using MiniCpmNative.Cli;

return new CommandLine(Console.Out, Console.Error, Runners.Installed).Run(args);
