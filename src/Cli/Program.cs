using MiniCpmNative.Cli;

return new CommandLine(Console.Out, Console.Error, new Runners()).Run(args);
