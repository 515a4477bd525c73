using MiniCpmNative.Cli;

var error = new Screen(Console.Error);
var output = new Screen(Console.Out, error.WriteLine);
return new CommandLine(output, error, new Runners()).Run(args);
